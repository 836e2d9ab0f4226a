"""The control channel: what an agent says, and which command an answer belongs to.

Nothing may be raised: what is no message is an `error`.
"""

from __future__ import annotations

from collections import deque

from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import KEPT_PAYLOAD, MAX_ACK, MAX_MESSAGE, Command, ControlChannel, encode
from tests.fuzz.choices import Choices
from tests.slow import Reading

_ANSWERS = (Code.ACK, Code.ERROR)
_CODES = (*_ANSWERS, Code.NEXT, Code.READY, Code.PROCESS_ASYNC_EVENT, Code.PING, 99, 2**32 - 1)
_LENGTHS = (0, 7, 5000, MAX_MESSAGE, MAX_MESSAGE + 1, MAX_ACK, MAX_ACK + 1)
_LONGEST_READ = 70_000


class _Model:
    """The channel, and what has to come of what went in and out."""

    def __init__(self) -> None:
        self.channel = ControlChannel()
        self.reading = Reading(4, 8, MAX_MESSAGE, {Code.ACK: MAX_ACK})
        self.received = 0
        self.taken = 0  # messages of the agent so far
        self.waiting: deque[Command] = deque()
        self.sent = b""

    def send(self, code: Code, payload: bytes) -> None:
        self.waiting.append(self.channel.send(code, payload))
        self.sent += code.to_bytes(4, "big") + (8 + len(payload)).to_bytes(4, "big") + payload
        assert bytes(self.channel.outgoing) == self.sent

    def receive(self, data: bytes) -> None:
        self.received += len(data)
        events = self.channel.receive_data(data)
        units = [(code, payload[:KEPT_PAYLOAD]) for code, payload in self.reading.read(data).units]
        new, self.taken = units[self.taken :], len(units)
        expected = []
        for message in new:
            if message[0] in _ANSWERS and self.waiting:
                assert self.waiting.popleft().answer == message
            else:
                expected.append(message)
        assert events == expected
        assert (self.channel.error is not None) == self.reading.broken
        assert self.channel.ready == any(code == Code.READY for code, _ in units)
        assert self.channel.unanswered == len(self.waiting)
        assert not any(command.is_answered() for command in self.waiting)


def run(choices: Choices) -> None:
    """Commands go out and what the agent says comes in, in pieces."""
    model, on_its_way = _Model(), b""
    while choices and model.received < _LONGEST_READ:
        kind = choices.number(3)
        if kind == 0:
            model.send(choices.pick((Code.PING, Code.EXEC_CMD)), choices.payload())
        elif kind == 1:
            on_its_way += _said(choices)
        elif kind == 2:
            size = choices.number(20)
            model.receive(on_its_way[:size])
            on_its_way = on_its_way[size:]
        else:
            model.receive(on_its_way)
            on_its_way = b""
    model.receive(on_its_way)


def _said(choices: Choices) -> bytes:
    kind = choices.number(5)
    if kind == 0:
        return choices.raw()
    code = choices.pick(_CODES)
    if kind == 1:
        payload = choices.payload(40)
        return code.to_bytes(4, "big") + choices.pick(_LENGTHS).to_bytes(4, "big") + payload
    return encode(code, choices.payload(KEPT_PAYLOAD + 40 if kind == 2 else 40))
