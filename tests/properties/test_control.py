"""The control channel: any bytes, in any pieces; and answers that always find their own commands."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import KEPT_PAYLOAD, Command, ControlChannel, ControlParser, encode
from tests.properties.support import cuts, in_pieces, payloads, pieces_of, stream_of
from tests.slow import Reading

MAX_MESSAGE = 64 * 1024 * 1024
MAX_ACK = 1024 * 1024 * 1024


def message(code: int, payload: bytes = b"", length: int | None = None) -> bytes:
    claimed = 8 + len(payload) if length is None else length
    return code.to_bytes(4, "big") + claimed.to_bytes(4, "big") + payload


codes = st.sampled_from([*Code]) | st.integers(0, 2**32 - 1)
right = st.builds(message, codes, payloads())
around_kept = st.integers(KEPT_PAYLOAD - 3, KEPT_PAYLOAD + 3) | st.just(2 * KEPT_PAYLOAD)
long = st.builds(lambda code, size: message(code, b"=" * size), codes, around_kept)
wrong = st.builds(message, codes, payloads(40), st.sampled_from([0, 7, MAX_MESSAGE + 1, 2**32 - 1]))
unfinished = st.builds(message, codes, payloads(40), st.sampled_from([5000, MAX_MESSAGE]))
streams = stream_of(right, wrong | unfinished | st.binary(max_size=10))


@given(codes, payloads())
def test_encoded_message_is_one_message(code: int, payload: bytes) -> None:
    assert encode(code, payload) == message(code, payload)
    assert ControlParser().receive_data(encode(code, payload)) == [(code, payload)]


@given(in_pieces(streams))
def test_parser_finds_what_a_byte_by_byte_reading_finds(pieces: list[bytes]) -> None:
    parser, found, fed = ControlParser(), [], b""
    for piece in pieces:
        fed += piece
        found += parser.receive_data(piece)
        expected = Reading(4, 8, MAX_MESSAGE, {Code.ACK: MAX_ACK}).read(fed)
        assert found == expected.units
        assert (parser.error is not None) == expected.broken


@given(st.lists(st.tuples(codes, around_kept), min_size=1, max_size=3), cuts)
def test_long_payload_is_cut_and_what_follows_is_understood(
    sent: list[tuple[int, int]], at: list[int]
) -> None:
    parser, found = ControlParser(), []
    for piece in pieces_of(b"".join(message(code, b"=" * size) for code, size in sent), at):
        found += parser.receive_data(piece)
    assert found == [(code, b"=" * min(size, KEPT_PAYLOAD)) for code, size in sent]


class Channel(RuleBasedStateMachine):
    """An agent that answers when it likes, in pieces it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.channel = ControlChannel()
        self.commands: list[Command] = []
        self.sent = b""
        self.not_answered: deque[int] = deque()  # numbers of commands, as the agent has them
        self.on_its_way = b""
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.events: list[tuple[int, bytes]] = []  # what the agent has said besides
        self.seen: list[tuple[int, bytes]] = []
        self.ready_said = False

    @rule(code=st.sampled_from([Code.PING, Code.EXEC_CMD, Code.DESTROY_POD]), payload=payloads(40))
    def ask(self, code: Code, payload: bytes) -> None:
        self.not_answered.append(len(self.commands))
        self.commands.append(self.channel.send(code, payload))
        self.sent += message(code, payload)

    @rule(size=st.integers(1, 100))
    def write(self, size: int) -> None:
        """The shell takes from the front what it has sent."""
        taken = bytes(self.channel.outgoing[:size])
        assert self.sent.startswith(taken)
        del self.channel.outgoing[:size]
        self.sent = self.sent[len(taken) :]

    @rule(code=st.sampled_from([Code.ACK, Code.ERROR]), payload=payloads(40))
    def answer(self, code: Code, payload: bytes) -> None:
        """Its oldest command; or nobody's, which is an event."""
        self.deliver(
            len(self.on_its_way)
        )  # what nobody waits for when it is said may be awaited when it comes
        if self.not_answered:
            self.answers[self.not_answered.popleft()] = (code, payload)
        else:
            self.events.append((code, payload))
            self.on_its_way += message(code, payload)
            self.deliver(len(self.on_its_way))
            return
        self.on_its_way += message(code, payload)

    @rule(
        code=st.sampled_from([Code.NEXT, Code.READY, Code.PROCESS_ASYNC_EVENT, Code.PING, 99]),
        payload=payloads(40),
    )
    def say(self, code: int, payload: bytes) -> None:
        self.events.append((code, payload))
        self.on_its_way += message(code, payload)
        self.ready_said = self.ready_said or code == Code.READY

    @precondition(lambda self: self.on_its_way)
    @rule(size=st.integers(1, 60))
    def deliver(self, size: int) -> None:
        self.seen += self.channel.receive_data(self.on_its_way[:size])
        self.on_its_way = self.on_its_way[size:]

    @invariant()
    def everything_is_where_it_belongs(self) -> None:
        assert self.channel.error is None
        assert self.channel.outgoing == self.sent
        assert self.seen == self.events[: len(self.seen)]
        answered = 0
        for number, command in enumerate(self.commands):
            if command.answer is not None:
                answered += 1
                assert command.answer == self.answers[number]
        assert self.channel.unanswered == len(self.commands) - answered

    def teardown(self) -> None:
        """Once everything has come, nothing is missing."""
        self.seen += self.channel.receive_data(self.on_its_way)
        assert self.seen == self.events
        assert self.channel.ready == self.ready_said
        answers = {n: command.answer for n, command in enumerate(self.commands) if command.answer is not None}
        assert answers == self.answers


TestChannel = Channel.TestCase
TestChannel.settings = settings(max_examples=settings().max_examples // 3)
