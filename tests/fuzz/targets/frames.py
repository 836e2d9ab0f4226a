"""I/O frames: what clients make of them, what the daemon sorts them into, and what cc-proxyctl shows.

`ProtocolError` may be raised where a slow reading finds a frame that is none, and there only.
"""

from __future__ import annotations

from contextlib import suppress

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.frames import MAX_FRAME, FrameParser
from cc_proxy.ctl.streams import ProcessStreams
from cc_proxy.hyperstart.frames import gather
from tests.fuzz.choices import Choices, in_pieces
from tests.slow import Reading, Sorted, decode_slowly, frame, sort_slowly

#: Few, so that neighbours often have the same; with some that look like one another in part.
_SEQS = (1, 2, 3, 0, 256, 257, 2**32 + 1, 2**63 + 1, 2**64 - 1)
_WRONG_LENGTHS = (0, 1, 11, MAX_FRAME + 1, 2**31, 2**32 - 1)
_OWNED = _SEQS[:6]


def run(choices: Choices) -> None:
    """One stream, read by all who read frames."""
    cuts = choices.cuts()
    start, share = choices.number(20), choices.number(255)
    owned = {seq for seq in _OWNED if choices.yes()}
    stream = b"".join(choices.some(8, lambda: _units(choices)))
    found = decode_slowly(stream, 8, 12, MAX_FRAME)
    _check_parser(list(in_pieces(stream, cuts)), found)
    _check_gather(stream, start, len(stream) * share // 255, owned)
    with suppress(ProtocolError):
        _check_process(stream)


def _units(choices: Choices) -> bytes:
    """A frame, or rows of frames of one length, or none at all."""
    kind = choices.number(5)
    if kind == 0:
        return frame(choices.pick(_SEQS), choices.payload(40), choices.pick(_WRONG_LENGTHS))
    if kind == 1:
        return choices.raw()
    if kind == 2:
        return frame(choices.pick(_SEQS), choices.payload(60)) * choices.number(100)
    if kind == 3:
        payload, seqs = choices.payload(20), (choices.pick(_SEQS), choices.pick(_SEQS))
        return b"".join(frame(seqs[bit], payload) for bit in map(int, f"{choices.number(2**40):b}"))
    if kind == 4:
        return frame(choices.pick(_SEQS), choices.payload(2_000))
    return frame(choices.pick(_SEQS), choices.payload(60))


def _check_parser(pieces: list[bytes], expected: Reading) -> None:
    parser, units = FrameParser(), []
    try:
        for piece in pieces:
            units += parser.receive_data(piece)
    except ProtocolError:
        assert expected.broken
        assert units == expected.units[: len(units)]
    else:
        assert not expected.broken
        assert units == expected.units


def _check_gather(stream: bytes, start: int, size: int, owned: set[int]) -> None:
    """Two seqs have the same owner. What is behind the end of what was read does not matter."""
    owners = {seq: f"owner of {seq & ~1}" for seq in owned}
    buffer = bytearray(bytes(start) + stream)
    batch = gather(buffer, memoryview(buffer), start, start + size, owners)
    by_owner = {owner: b"".join(slices) for owner, slices in batch.slices.items()}
    found = Sorted(by_owner, batch.strays, batch.frames, batch.stop - start, batch.error is not None)
    assert found == sort_slowly(stream[:size], owners)


def _check_process(stream: bytes) -> None:
    """Whole or a byte at a time, it is the same output and the same status."""
    at_once, in_bytes = ProcessStreams(1), ProcessStreams(1)
    whole = at_once.receive_data(stream)
    single = [piece for at in range(len(stream)) for piece in in_bytes.receive_data(stream[at : at + 1])]
    for fd in (1, 2):
        output = b"".join(piece for to, piece in whole if to == fd)
        assert output == b"".join(piece for to, piece in single if to == fd)
    assert at_once.status == in_bytes.status
