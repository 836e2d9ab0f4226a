"""Frames, on both sides: any bytes, in any pieces, in any place of a buffer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.frames import MAX_FRAME, Frame, FrameParser, encode_frame
from cc_proxy.hyperstart.frames import MAX_TO_AGENT, MOST_IN_SLICE, gather
from cc_proxy.hyperstart.splitter import StdinSplitter, state_of, whole_frames
from tests.properties.support import in_pieces, payloads, stream_of
from tests.slow import Sorted, StdinReader, decode_slowly, frame, frames_said, sort_slowly, split

#: Few, so that neighbours often have the same; with some that look like one another in part.
seqs = st.sampled_from([0, 1, 2, 3, 256, 257, 2**32 + 1, 2**63 + 1, 2**64 - 1])
wrong_lengths = st.sampled_from([0, 1, 11, MAX_FRAME + 1, 2**31, 2**32 - 1])

right = st.builds(frame, seqs, payloads())
wrong = st.builds(frame, seqs, payloads(40), wrong_lengths)
# What a row is made of. The frame in front or behind may have the same length, or the same seq, or neither.
rows = st.builds(lambda unit, times: unit * times, st.builds(frame, seqs, payloads(60)), st.integers(1, 300))
# What looks like a row if one does not look closely: one length, two seqs in any order.
mixed = st.builds(
    lambda two, order, payload: b"".join(frame(two[number], payload) for number in order),
    st.tuples(seqs, seqs),
    st.lists(st.integers(0, 1), min_size=33, max_size=60),
    payloads(20),
)
streams = stream_of(right | right | rows | mixed, wrong | st.binary(max_size=15))
right_streams = st.lists(right | rows | mixed, max_size=8).map(b"".join)


@given(seqs, payloads(MAX_FRAME))
def test_encoded_frame_is_one_frame(seq: int, payload: bytes) -> None:
    encoded = encode_frame(seq, payload)
    assert encoded == encode_frame(seq, memoryview(payload)) == frame(seq, payload)
    if len(encoded) <= MAX_FRAME:
        assert FrameParser().receive_data(encoded) == [Frame(seq, payload)]


@given(in_pieces(streams))
def test_parser_finds_what_a_byte_by_byte_reading_finds(pieces: list[bytes]) -> None:
    parser, found, fed = FrameParser(), [], b""
    for piece in pieces:
        fed += piece
        expected = decode_slowly(fed, 8, 12, 65_536)
        if expected.broken:
            with pytest.raises(ProtocolError):
                parser.receive_data(piece)
            return
        found += parser.receive_data(piece)
        assert found == expected.units


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Rows with a byte changed somewhere, where the row may be taken for longer or shorter than it is."""
    stream = bytearray(draw(right_streams))
    for _ in range(draw(st.integers(0, 2))):
        if stream:
            stream[draw(st.integers(0, len(stream) - 1))] ^= draw(st.sampled_from([1, 2, 128, 255]))
    return bytes(stream[: draw(st.integers(0, len(stream)))] if draw(st.booleans()) else stream)


@given(streams | damaged(), st.binary(max_size=20), st.integers(0, 1000) | st.just(1000), st.sets(seqs))
@example(frame(1, b"x") * 33 + frame(2, b"x") + frame(1, b"x") * 3, b"", 1000, {1})
@example(frame(1, b"x") * 32 + frame(1, b"x", 0), b"", 1000, {1})
@example(frame(0) * 100, b"", 500, {0})
@example(frame(1, bytes(30)) * 2_000, b"", 1000, {1})
@example(
    frame(1) + frame(0, bytes(30)) * 600 + (frame(0, bytes(40)) + frame(1, bytes(40))) * 900,
    b"",
    1000,
    {0, 1},
)
@example(b"".join(frame(1, bytes(size)) for size in range(400)), b"", 1000, {1})
@example(frame(1) * 9 + frame(1, bytes(40_000)) + frame(1) * 9, b"", 1000, {1})
def test_gather_sorts_as_a_byte_by_byte_reading_does(
    stream: bytes, before: bytes, cut: int, owned: set[int]
) -> None:
    """Two seqs have the same owner. What is behind the end of what was read does not matter."""
    owners = {seq: f"owner of {seq & ~1}" for seq in owned}
    buffer = bytearray(before + stream)
    start, stop = len(before), len(before) + cut * len(stream) // 1000
    batch = gather(buffer, memoryview(buffer), start, stop, owners)
    by_owner = {owner: b"".join(slices) for owner, slices in batch.slices.items()}
    found = Sorted(by_owner, batch.strays, batch.frames, batch.stop - start, batch.error is not None)
    assert found == sort_slowly(stream[: stop - start], owners)
    for piece in (piece for slices in batch.slices.values() for piece in slices):
        assert piece.obj is buffer
        check_sendable([piece])


def check_sendable(pieces: Sequence[bytes | memoryview]) -> None:
    """They are whole frames, and short enough to be sent all at once or not at all, or one frame."""
    found = decode_slowly(b"".join(pieces), 8, 12, MAX_FRAME)
    assert not found.rest
    assert sum(map(len, pieces)) <= MOST_IN_SLICE or len(found.units) == 1


# Stdin ------------------------------------------------------------------------------------------------------

BASE = 257

some_stdin = st.one_of(payloads(60), payloads(MAX_TO_AGENT + 20), payloads(3 * MAX_TO_AGENT))
from_client = st.builds(frame, st.just(BASE), some_stdin)
not_his = st.builds(frame, st.sampled_from([0, 1, 256, 258, 2**63 + BASE]), payloads(40))
too_short = st.builds(frame, st.just(BASE), st.binary(max_size=20), st.integers(0, 11))
endless = st.builds(frame, st.just(BASE), payloads(40), st.sampled_from([2**31, 2**32 - 1]))
short_from_client = st.builds(frame, st.just(BASE), payloads(40))
row_from_client = st.builds(
    lambda unit, times: unit * times, short_from_client, st.sampled_from([31, 40, 200])
)
row_not_his = st.builds(lambda unit: unit * 40, not_his)
client_streams = stream_of(from_client | row_from_client, not_his | row_not_his | too_short | endless)


@given(in_pieces(client_streams), st.integers(0, 30))
@example([frame(BASE, b"x") * 40 + frame(BASE) + frame(258, b"x")], 3)
@example([frame(BASE, b"x") + frame(BASE)[:5], frame(BASE)[5:]], 0)
@example([frame(BASE, b"x") + frame(258, b"x") * 40], 0)
@example([frame(BASE, b"abc") + frame(BASE, bytes(60)) * 1_500], 0)
@example([frame(258), frame(BASE, b"too late")], 0)
@example([frame(BASE, bytes(MAX_TO_AGENT - 11)) * 20], 0)
@example([frame(BASE, bytes(3_000)) * 10 + frame(BASE, bytes(60)) * 900], 0)
@example([frame(BASE, bytes(MAX_TO_AGENT - 12)) + frame(BASE, bytes(MAX_TO_AGENT - 11)) + frame(BASE)], 0)
def test_splitter_passes_what_a_byte_by_byte_reading_passes(pieces: list[bytes], start: int) -> None:
    """After every read: all but an unfinished header has been handed out, in frames an agent can take."""
    splitter, expected = StdinSplitter(BASE), StdinReader(BASE)
    word = splitter.word()
    said: list[int | None] = []
    for piece in pieces:
        expected.receive(piece)
        buffer = bytearray(bytes(start) + 3 * piece)
        over = splitter.error is not None
        handed_out = split(splitter, buffer, start, start + len(piece))
        check_pieces(handed_out)
        if not over:
            other = StdinSplitter(BASE)
            other.restore(state_of(BASE, word))
            anew = bytearray(bytes(start) + 3 * piece)
            assert b"".join(split(other, anew, start, start + len(piece))) == b"".join(handed_out)
            assert (other.error is None) == (splitter.error is None)
        word = splitter.word()
        said += frames_said(BASE, b"".join(handed_out))
        assert said == expected.said
        assert (splitter.error is not None) == expected.broken
        assert splitter.payload_bytes == len(said) - said.count(None)
        assert splitter.at_eof == (said[-1:] == [None])


def check_pieces(pieces: Sequence[bytes | memoryview]) -> None:
    """Between each two, there is a place where one may begin to send, at the next one at the latest."""
    begin = 0
    for end in range(1, len(pieces) + 1):
        stop = whole_frames(pieces, end)
        assert stop in {end, end - 1}
        if stop > begin:
            check_sendable(pieces[begin:stop])
            begin = stop
    assert begin == len(pieces)


@given(st.lists(st.builds(frame, st.just(BASE), payloads(MAX_TO_AGENT - 12)), max_size=20).map(b"".join))
def test_frames_that_the_agent_can_take_pass_as_they_are(stream: bytes) -> None:
    buffer = bytearray(stream)
    pieces = split(StdinSplitter(BASE), buffer, 0, len(buffer))
    assert b"".join(pieces) == stream
    assert all(isinstance(piece, memoryview) and piece.obj is buffer for piece in pieces)
