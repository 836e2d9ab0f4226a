"""The benchmark's check of every byte: it passes what is right, however it arrives, and nothing else."""

from __future__ import annotations

import random

import pytest

from bench.streams import (
    BUFFER_SIZE,
    FIRST_MARKER,
    MAX_TO_AGENT,
    StdinCheck,
    StreamCheck,
    WrongBytesError,
    cycle_of,
    frames_in_cycle,
    matching,
    payload_of,
    split,
)
from cc_proxy.api import FrameParser, encode_frame


def feed(check: StreamCheck, data: bytes | bytearray, size: int) -> None:
    view = memoryview(data)
    for at in range(0, len(data), size):
        check.take(view[at : at + size])


def feed_stdin(check: StdinCheck, data: bytes, size: int = BUFFER_SIZE) -> None:
    """As a VM reads: what is left of a frame stays in front of what comes next."""
    buffer = bytearray()
    for at in range(0, len(data), size):
        buffer += data[at : at + size]
        view = memoryview(buffer)
        used = check.take(buffer, view, len(buffer))
        view.release()
        del buffer[:used]
    assert not buffer


def reframed(seq: int, payload: bytes, sizes: random.Random) -> bytes:
    """The same payload in frames cut anywhere."""
    frames = []
    at = 0
    while at < len(payload):
        size = sizes.randint(1, MAX_TO_AGENT - 12)
        frames.append(encode_frame(seq, payload[at : at + size]))
        at += size
    return b"".join(frames)


def payload_in(data: bytes) -> bytes:
    return b"".join(frame.payload for frame in FrameParser().receive_data(data))


class TestCycle:
    def test_streams_take_turns(self) -> None:
        frames = FrameParser().receive_data(cycle_of(0, (1, 5, 3), 64, 2))
        assert [frame.seq for frame in frames] == [1, 5, 3, 1, 5, 3]
        assert all(len(frame.payload) == 64 for frame in frames)

    def test_no_two_frames_are_alike(self) -> None:
        frames = [payload_of(vm, seq, n, 64) for vm in range(3) for seq in range(1, 5) for n in range(500)]
        assert len(set(frames)) == len(frames)

    @pytest.mark.parametrize(("streams", "payload"), [(1, 64), (16, 8192), (1000, 1024)])
    def test_is_long_enough_to_tell_frames_apart(self, streams: int, payload: int) -> None:
        frames = frames_in_cycle(streams, payload)
        assert frames >= 4
        assert frames * streams * (payload + 12) > 900_000


class TestStreamCheck:
    cycle = cycle_of(0, (1, 2), 100, 50)

    @pytest.mark.parametrize("size", [1000, 11_199, 11_200, 16_384])
    def test_passes_what_was_sent_in_any_pieces(self, size: int) -> None:
        check = StreamCheck("it", self.cycle, 7)
        feed(check, self.cycle * 7, min(size, check.read_size))
        assert not check.left

    def test_is_not_done_before_the_last_byte(self) -> None:
        check = StreamCheck("it", self.cycle, 3)
        feed(check, (self.cycle * 3)[:-1], 5000)
        assert check.left == 1

    @pytest.mark.parametrize("at", [0, 4999, 5000, 22_399, 22_400, 33_599])
    def test_finds_any_wrong_byte_and_says_where(self, at: int) -> None:
        data = bytearray(self.cycle * 3)
        data[at] ^= 1
        with pytest.raises(WrongBytesError, match=f"it: byte {at} of 33600 "):
            feed(StreamCheck("it", self.cycle, 3), data, 5000)

    def test_finds_a_frame_that_is_missing(self) -> None:
        with pytest.raises(WrongBytesError):
            feed(StreamCheck("it", self.cycle, 3), self.cycle[112:] + self.cycle * 2, 5000)

    def test_finds_frames_that_have_changed_places(self) -> None:
        data = self.cycle[:112] + self.cycle[336:448] + self.cycle[224:336] + self.cycle[112:224]
        with pytest.raises(WrongBytesError, match="byte 131 "):
            feed(StreamCheck("it", self.cycle, 1), data, 5000)

    def test_finds_more_than_was_sent(self) -> None:
        with pytest.raises(WrongBytesError, match="more than the 11200 bytes"):
            feed(StreamCheck("it", self.cycle, 1), self.cycle + b"x", 5000)


class TestStdinCheck:
    def check(self, payload: int, cycles: int = 3) -> tuple[StdinCheck, dict[int, bytes]]:
        cycles_of = {seq: cycle_of(0, (seq,), payload, 40) for seq in (1, 2)}
        return StdinCheck(cycles_of, payload, cycles), cycles_of

    @pytest.mark.parametrize("payload", [64, 1024, 4084])
    def test_passes_frames_as_they_were_sent(self, payload: int) -> None:
        check, cycles = self.check(payload)
        feed_stdin(check, cycles[2] * 3 + cycles[1] * 3)
        assert not check.left

    @pytest.mark.parametrize("size", [1, 700, 65_536])
    def test_passes_them_in_any_pieces(self, size: int) -> None:
        check, cycles = self.check(64, 1)
        feed_stdin(check, cycles[1] + cycles[2], size)
        assert not check.left

    def test_passes_long_frames_split_for_the_agent(self) -> None:
        check, cycles = self.check(8192, 1)
        for seq in (1, 2):
            payload = payload_in(cycles[seq])
            whole = [payload[at : at + 8192] for at in range(0, len(payload), 8192)]
            feed_stdin(check, b"".join(frame for one in whole for frame in split(seq, one)))
        assert not check.left

    @pytest.mark.parametrize("payload", [64, 1024, 8192])
    def test_passes_the_payload_in_any_frames(self, payload: int) -> None:
        sizes = random.Random(7)
        check, cycles = self.check(payload)
        for _ in range(3):
            for seq in (2, 1):
                feed_stdin(check, reframed(seq, payload_in(cycles[seq]), sizes))
        assert not check.left

    def test_collects_markers(self) -> None:
        check, cycles = self.check(64, 1)
        marker = encode_frame(FIRST_MARKER + 1)
        feed_stdin(check, cycles[1][:760] + marker + cycles[1][760:] + cycles[2])
        assert check.markers == [marker]
        assert not check.left

    @pytest.mark.parametrize("payload", [64, 1024])
    def test_finds_any_wrong_byte(self, payload: int) -> None:
        _, cycles = self.check(payload)
        for at in (12, payload + 11, 20 * (payload + 12) + 12, len(cycles[1]) - 1):
            check, _ = self.check(payload)
            data = bytearray(cycles[1])
            data[at] ^= 1
            with pytest.raises(WrongBytesError, match="stdin of stream 1: wrong bytes"):
                feed_stdin(check, bytes(data))

    def test_finds_payload_on_another_clients_stream(self) -> None:
        check, _ = self.check(64)
        with pytest.raises(WrongBytesError, match="stdin of stream 2: wrong bytes"):
            feed_stdin(check, encode_frame(2, payload_of(0, 1, 0, 64)))

    def test_finds_payload_sent_twice(self) -> None:
        check, cycles = self.check(64)
        with pytest.raises(WrongBytesError, match="stdin of stream 1: wrong bytes"):
            feed_stdin(check, cycles[1][: 76 * 5] + cycles[1][76 * 4 :])

    def test_finds_more_than_was_sent(self) -> None:
        check, cycles = self.check(64, 1)
        with pytest.raises(WrongBytesError, match="more than the 2560 bytes"):
            feed_stdin(check, cycles[1] + encode_frame(1, b"more"))

    @pytest.mark.parametrize("seq", [3, FIRST_MARKER])
    def test_finds_payload_on_nobodys_stream(self, seq: int) -> None:
        check, _ = self.check(64)
        with pytest.raises(WrongBytesError, match="which is nobody's"):
            feed_stdin(check, encode_frame(seq, b"?"))

    @pytest.mark.parametrize("length", [11, MAX_TO_AGENT + 1])
    def test_finds_frames_that_would_end_an_agent(self, length: int) -> None:
        check, _ = self.check(8192)
        broken = bytearray(encode_frame(1, payload_of(0, 1, 0, 8192)))
        broken[8:12] = length.to_bytes(4, "big")
        with pytest.raises(WrongBytesError, match=f"total length of {length}"):
            feed_stdin(check, bytes(broken))


@pytest.mark.parametrize("good", [0, 1, 6, 7, 20, 21])
def test_matching_counts_whole_units(good: int) -> None:
    expected = bytes(range(30))
    data = bytearray(expected[2:23])
    if good < len(data):
        data[good] ^= 0xFF
    assert matching(expected, 2, memoryview(data), 7) == good - good % 7
