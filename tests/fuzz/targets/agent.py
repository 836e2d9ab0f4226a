"""What the embedded agent reads: commands, and frames of stdin.

`CommandRefused` may be raised for a command that is none, `Panic` for what the real agent would not survive
either: a message over its buffer.
"""

from __future__ import annotations

from cc_proxy.agent.commands import decode
from cc_proxy.agent.errors import CommandRefused, Panic
from cc_proxy.agent.inbound import ControlReceiver, HostFrames
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import MAX_COMMAND, encode
from tests.fuzz.choices import Choices, in_pieces
from tests.fuzz.grammar import value_text
from tests.slow import decode_slowly, frame

_WORDS = (
    "id", "process", "container", "args", "envs", "env", "value", "stdio", "stderr", "terminal", "workdir",
    "signal", "seq", "row", "column", "file", "hostname", "rlimits", "user", "rows", "columns", "unknown",
)  # fmt: skip
_LENGTHS = (0, 4, 7, 12, MAX_COMMAND, MAX_COMMAND + 1, 2**32 - 1)


def run(choices: Choices) -> None:
    """A stream of commands, then one of frames."""
    cuts = choices.cuts()
    commands = choices.some(5, lambda: _command(choices))
    _check_commands(b"".join(commands), choices)
    frames = b"".join(choices.some(6, lambda: _frame(choices)))
    _check_frames(list(in_pieces(frames, cuts)), frames)


def _command(choices: Choices) -> bytes:
    code: int = choices.pick([*Code, 99])
    if choices.number(5) == 0:
        return code.to_bytes(4, "big") + int(choices.pick(_LENGTHS)).to_bytes(4, "big") + choices.raw()
    return encode(code, value_text(choices, _WORDS))


def _frame(choices: Choices) -> bytes:
    length = choices.pick((None, None, None, 0, 4096, 4097, 2**32 - 1))
    return frame(choices.number(300), choices.payload(4090), length)


def _check_commands(stream: bytes, choices: Choices) -> None:
    receiver = ControlReceiver()
    while stream:
        size = min(receiver.wanted, 1 + choices.number(255))
        assert size
        try:
            message = receiver.receive_data(stream[:size])
            if message is not None:
                decode(message.code, message.payload)
        except CommandRefused as error:
            assert str(error)
        except Panic:
            return
        stream = stream[size:]


def _check_frames(pieces: list[bytes], stream: bytes) -> None:
    """All up to the first that is too long are found, unless one before it in the same read is no frame."""
    frames, found = HostFrames(), []
    for piece in pieces:
        found += frames.receive_data(piece)
        if frames.fatal:
            break
    expected = decode_slowly(stream, 8, 12, 4096)
    assert found == expected.units[: len(found)]
    assert bool(frames.fatal) == expected.broken
    assert expected.broken or len(found) == len(expected.units)
