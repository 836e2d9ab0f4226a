"""Frames in, output and an exit status out."""

from __future__ import annotations

import pytest

from cc_proxy.api import FrameParser, ProtocolError, encode_frame
from cc_proxy.ctl.streams import ExitWatch, ProcessStreams, stdin_frames

OUT, ERR = 5, 6


def frames(*parts: tuple[int, bytes]) -> bytes:
    return b"".join(encode_frame(seq, payload) for seq, payload in parts)


@pytest.mark.parametrize(
    ("payloads", "output", "status"),
    [
        pytest.param([b"", b"\x07"], b"", 7, id="silent"),
        pytest.param([b"", b"\x00"], b"", 0, id="success"),
        pytest.param([b"", b"\xff"], b"", 255, id="greatest"),
        pytest.param([b"a", b"", b"\x07"], b"a", 7, id="one byte of output before"),
        pytest.param([b"", b"", b"", b"\x07"], b"", 7, id="more empty frames before"),
        pytest.param([b"", b"late", b"\x07"], b"late", 7, id="output between"),
        pytest.param([b"", b"\x07", b"\x08", b"more", b""], b"", 7, id="anything after"),
        pytest.param([b"a", b"b"], b"ab", None, id="runs"),
        pytest.param([b"a", b""], b"a", None, id="at its end"),
    ],
)
def test_exit_watch(payloads: list[bytes], output: bytes, status: int | None) -> None:
    watch = ExitWatch()
    assert b"".join(map(watch.output, payloads)) == output
    assert watch.status == status


def test_streams_are_kept_apart_and_in_order() -> None:
    streams = ProcessStreams(OUT)
    data = frames((OUT, b"a"), (OUT, b"b"), (ERR, b"c"), (OUT, b"d"), (ERR, b"e"), (ERR, b""), (ERR, b"f"))
    assert streams.receive_data(data) == [(1, b"ab"), (2, b"c"), (1, b"d"), (2, b"ef")]
    assert streams.status is None


def test_the_end_of_stderr_says_nothing_about_the_process() -> None:
    streams = ProcessStreams(OUT)
    assert streams.receive_data(frames((ERR, b""), (ERR, b"\x07"))) == [(2, b"\x07")]
    assert streams.status is None


def test_any_pieces() -> None:
    data = frames((OUT, b"out"), (ERR, b"err"), (OUT, b""), (OUT, b"\x03"))
    streams = ProcessStreams(OUT)
    output = [run for byte in data for run in streams.receive_data(bytes([byte]))]
    assert output == [(1, b"out"), (2, b"err")]
    assert streams.status == 3


def test_no_frames() -> None:
    with pytest.raises(ProtocolError):
        ProcessStreams(OUT).receive_data(bytes(12))


@pytest.mark.parametrize("size", [1, 8179, 8180, 8181, 16360, 100_000])
def test_stdin_frames(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    parsed = FrameParser().receive_data(stdin_frames(OUT, data))
    assert b"".join(frame.payload for frame in parsed) == data
    assert {frame.seq for frame in parsed} == {OUT}
    assert all(0 < len(frame.payload) + 12 <= 8192 for frame in parsed)


def test_the_end_of_stdin() -> None:
    assert stdin_frames(OUT, b"") == encode_frame(OUT)
