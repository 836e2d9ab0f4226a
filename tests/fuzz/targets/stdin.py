"""What a client sends on its I/O fd, made into frames that the agent can take.

Nothing may be raised: a frame that is not the client's to send is an `error`.
"""

from __future__ import annotations

from cc_proxy.hyperstart.splitter import StdinSplitter
from tests.fuzz.choices import Choices, in_pieces
from tests.slow import StdinReader, frame, frames_said, split

_BASE = 257
_SEQS = (_BASE, _BASE, _BASE, _BASE, _BASE, 256, 258, 0, 2**63 + _BASE)
_LENGTHS = (0, 11, 2**31, 2**32 - 1)


def run(choices: Choices) -> None:
    """After each read: all but an unfinished header has been handed out, in frames an agent can take."""
    cuts, start = choices.cuts(), choices.number(30)
    stream = b"".join(choices.some(6, lambda: _units(choices)))
    splitter, expected = StdinSplitter(_BASE), StdinReader(_BASE)
    said: list[int | None] = []
    for piece in in_pieces(stream, cuts):
        expected.receive(piece)
        buffer = bytearray(bytes(start) + piece + piece)
        out = b"".join(split(splitter, buffer, start, start + len(piece)))
        said += frames_said(_BASE, out)
        _check(splitter, said, expected)
    assert splitter.frames >= said.count(None)


def _units(choices: Choices) -> bytes:
    kind = choices.number(5)
    if kind == 0:
        return choices.raw()
    if kind == 1:
        return frame(choices.pick(_SEQS), choices.payload(40), choices.pick(_LENGTHS))
    if kind == 2:
        return frame(choices.pick(_SEQS), choices.payload(40)) * choices.number(120)
    if kind == 3:
        return frame(_BASE, choices.payload(5_000))
    if kind == 4:
        return frame(_BASE, bytes(4096 - 14 + choices.number(4)))
    return frame(choices.pick(_SEQS), choices.payload(60))


def _check(splitter: StdinSplitter, said: list[int | None], expected: StdinReader) -> None:
    assert said == expected.said
    assert (splitter.error is not None) == expected.broken
    assert splitter.payload_bytes == len(said) - said.count(None)
    assert splitter.at_eof == (said[-1:] == [None])
