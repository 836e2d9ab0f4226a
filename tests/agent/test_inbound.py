"""What the host sends, taken in without any I/O: NEXT counting, limits, the 512 bytes of stdin."""

from __future__ import annotations

import pytest

from cc_proxy.agent.errors import Panic
from cc_proxy.agent.inbound import ControlReceiver, HostFrames, StdinBuffer, next_message
from cc_proxy.api.frames import FRAME_HEADER, Frame, encode_frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, ControlMessage, encode

BODY = b'{"a":1}'


def in_reads(receiver: ControlReceiver, data: bytes, most: int) -> tuple[list[int], list[ControlMessage]]:
    """Feeds data in reads of at most `most` bytes; returns what was read each time, and the messages."""
    sizes, messages = [], []
    while data:
        size = min(receiver.wanted, most)
        message = receiver.receive_data(data[:size])
        sizes.append(len(data[:size]))
        data = data[size:]
        if message is not None:
            messages.append(message)
    return sizes, messages


def test_next_message() -> None:
    assert next_message(8) == bytes.fromhex("0000000e 0000000c 00000008")


@pytest.mark.parametrize(
    ("most", "sizes"), [(100, [8, 7]), (8, [8, 7]), (5, [5, 3, 5, 2]), (1, [1] * 15)], ids=str
)
def test_header_and_body_are_reads_of_their_own(most: int, sizes: list[int]) -> None:
    receiver = ControlReceiver()
    for _ in range(2):
        message = ControlMessage(Code.PING, BODY)
        assert in_reads(receiver, encode(Code.PING, BODY), most) == (sizes, [message])


@pytest.mark.parametrize("length", range(9))
def test_a_short_length_is_an_empty_body(length: int) -> None:
    receiver = ControlReceiver()
    data = HEADER.pack(Code.PING, length) + encode(Code.VERSION)
    assert in_reads(receiver, data, 100)[1] == [ControlMessage(Code.PING), ControlMessage(Code.VERSION)]


def test_the_longest_command() -> None:
    data = encode(Code.PING, bytes(10_232))
    assert in_reads(ControlReceiver(), data, 4096)[1] == [ControlMessage(Code.PING, bytes(10_232))]


@pytest.mark.parametrize("length", [10_241, 2**32 - 1])
def test_a_longer_one_is_known_by_its_header(length: int) -> None:
    with pytest.raises(Panic):
        ControlReceiver().receive_data(HEADER.pack(Code.PING, length))


def test_frames_up_to_4096_in_any_pieces() -> None:
    frames = [Frame(1, b""), Frame(2**64 - 1, b"x"), Frame(3, bytes(4084))]
    data = b"".join(encode_frame(*frame) for frame in frames)
    for size in (1, 11, 4096, len(data)):
        parser = HostFrames()
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert [frame for piece in pieces for frame in parser.receive_data(piece)] == frames
        assert parser.fatal is None


@pytest.mark.parametrize("length", [4097, 65_537, 2**32 - 1])
@pytest.mark.parametrize("whole", [True, False])
def test_a_longer_frame_is_fatal_at_its_header(length: int, whole: bool) -> None:
    parser = HostFrames()
    assert parser.receive_data(encode_frame(1, b"before")) == [Frame(1, b"before")]
    body = bytes(length - FRAME_HEADER.size) if whole and length < 2**20 else b""
    assert parser.receive_data(FRAME_HEADER.pack(1, length) + body) == []
    assert parser.fatal is not None


def test_the_frames_before_a_long_one_count() -> None:
    parser = HostFrames()
    good, bad = encode_frame(1, b"before"), encode_frame(1, bytes(4085))
    assert parser.receive_data(good + bad + good) == [Frame(1, b"before")]
    assert parser.fatal is not None


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_without_its_header_is_fatal(length: int) -> None:
    parser = HostFrames()
    assert parser.receive_data(FRAME_HEADER.pack(1, length)) == []
    assert parser.fatal is not None


def test_stdin_keeps_512_bytes() -> None:
    buffer = StdinBuffer()
    buffer.put(b"a" * 400)
    buffer.put(b"b" * 400)
    assert buffer.peek() == b"a" * 400 + b"b" * 112
    assert buffer.dropped == 288
    buffer.put(b"c")
    assert buffer.dropped == 289
    buffer.consume(511)
    assert buffer.peek() == b"b"
    buffer.put(b"d" * 600)
    assert buffer.peek() == b"b" + b"d" * 511


def test_stdin_ends_behind_what_waits() -> None:
    buffer = StdinBuffer()
    buffer.put(b"last")
    buffer.end()
    buffer.put(b"too late")
    assert not buffer.is_over
    assert buffer.dropped == 8
    buffer.consume(4)
    assert buffer.is_over
