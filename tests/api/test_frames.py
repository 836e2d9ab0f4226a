"""I/O frames as a client meets them."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from cc_proxy.api import Frame, FrameParser, ProtocolError, encode_frame
from tests.api.support import cpu_seconds, frame, splits

LONGEST = 65_536
SEQS = [0, 1, 255, 256, 2**32 - 1, 2**32, 2**63, 2**64 - 1]


def frames_of(pieces: list[bytes]) -> list[Frame]:
    parser = FrameParser()
    return [frame for piece in pieces for frame in parser.receive_data(piece)]


@pytest.mark.parametrize(
    ("seq", "payload", "wire"),
    [
        (3, b"A\n", bytes.fromhex("0000000000000003 0000000e 410a")),
        (3, b"", bytes.fromhex("0000000000000003 0000000c")),
        (3, b"\x07", bytes.fromhex("0000000000000003 0000000d 07")),
        (11, b"line1\n", bytes.fromhex("000000000000000b 00000012 6c696e65310a")),
        (0x0102030405060708, b"\0", bytes.fromhex("0102030405060708 0000000d 00")),
        (2**64 - 1, b"", bytes.fromhex("ffffffffffffffff 0000000c")),
        (1, memoryview(b"xy"), bytes.fromhex("0000000000000001 0000000e 7879")),
    ],
)
def test_frames_out(seq: int, payload: bytes | memoryview, wire: bytes) -> None:
    assert encode_frame(seq, payload) == wire


def test_without_payload_it_is_end_of_file() -> None:
    assert encode_frame(5) == frame(5, b"")


def test_a_long_frame_out() -> None:
    assert encode_frame(1, b"x" * 70_000) == b"\0\0\0\0\0\0\0\x01\0\x01\x11\x7c" + b"x" * 70_000


@pytest.mark.parametrize("behind", [b"", frame(9, b"late")[:-1], frame(9)[:-1], b"\0"])
def test_frames_in_whatever_pieces(behind: bytes) -> None:
    """The transcript of a process: output, errors, end of file and exit status."""
    stream = frame(3, b"A\n") + frame(4, b"B\n") + frame(3) + frame(3, b"\x07") + frame(2**64 - 1, bytes(20))
    expected = [(3, b"A\n"), (4, b"B\n"), (3, b""), (3, b"\x07"), (2**64 - 1, bytes(20))]
    for pieces in splits(stream + behind):
        assert frames_of(pieces) == expected, pieces


def test_a_frame_comes_out_with_its_last_byte() -> None:
    parser = FrameParser()
    for stream in (frame(1, b"abc"), frame(2)):
        for at in range(len(stream) - 1):
            assert parser.receive_data(stream[at : at + 1]) == []
        assert len(parser.receive_data(stream[-1:])) == 1


def test_nothing_received_changes_nothing() -> None:
    assert frames_of([b"", frame(1, b"a")[:5], b"", frame(1, b"a")[5:], b""]) == [(1, b"a")]


def test_the_longest_frame() -> None:
    payload = random.Random(1).randbytes(LONGEST - 12)
    stream = frame(1, payload) + frame(2, b"b")
    for size in (len(stream), 4_096, 1_000):
        assert frames_of([stream[at : at + size] for at in range(0, len(stream), size)]) == [
            (1, payload),
            (2, b"b"),
        ]


@pytest.mark.parametrize("length", [0, 1, 4, 8, 11, LONGEST + 1, 2**31, 2**32 - 1])
def test_an_impossible_length_is_an_error_that_names_it(length: int) -> None:
    for seq in (1, 2**64 - 1):
        for pieces in splits(frame(seq, bytes(4), length=length)):
            with pytest.raises(ProtocolError, match=rf"{seq}\b.*\b{length}\b"):
                frames_of(pieces)


def test_one_byte_too_many_is_an_error_even_if_all_of_it_is_there() -> None:
    with pytest.raises(ProtocolError, match="65537"):
        frames_of([frame(1, bytes(LONGEST + 1 - 12))])


def test_an_impossible_length_is_noticed_behind_others() -> None:
    for pieces in splits(frame(1, b"good") + frame(1, length=11)):
        with pytest.raises(ProtocolError):
            frames_of(pieces)


def test_random_streams_in_random_pieces() -> None:
    rng = random.Random(2)
    for _ in range(100):
        expected = [
            (rng.choice(SEQS), rng.randbytes(rng.choice((0, 1, 2, 11, 12, 13, 500))))
            for _ in range(rng.randrange(30))
        ]
        stream = b"".join(frame(seq, payload) for seq, payload in expected)
        pieces = []
        while stream:
            size = rng.choice((1, 7, 12, 100, 2_000))
            pieces.append(stream[:size])
            stream = stream[size:]
        assert frames_of(pieces) == expected


def test_no_more_is_held_than_an_unfinished_frame() -> None:
    parser = FrameParser()
    tracemalloc.start()
    try:
        for _ in range(50):
            parser.receive_data(bytes(frame(1, bytes(30_000)) + frame(1, bytes(500))[:100]))
            parser.receive_data(bytes(frame(1, bytes(500))[100:]))
        assert tracemalloc.get_traced_memory()[0] < 10_000
    finally:
        tracemalloc.stop()


def test_an_announced_length_allocates_nothing() -> None:
    parser = FrameParser()
    tracemalloc.start()
    try:
        parser.receive_data(frame(1, b"x", length=LONGEST))
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_many_frames_in_one_piece_are_not_copied_for_each() -> None:
    stream = frame(1) * 20_000

    def run() -> None:
        assert len(frames_of([stream])) == 20_000

    assert cpu_seconds(run) < 0.5
