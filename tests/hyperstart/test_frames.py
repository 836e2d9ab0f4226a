"""The I/O channel in batches, against readings of it that take a frame at a time."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from cc_proxy.hyperstart.frames import (
    HEADER_SIZE,
    MAX_FROM_AGENT,
    MAX_TO_AGENT,
    MOST_IN_SLICE,
    Batch,
    gather,
)
from cc_proxy.hyperstart.splitter import StdinSplitter
from tests.api.support import cpu_seconds, frame, splits
from tests.slow import split

LONGEST = 65_536

# Two streams of one client, one of another; anything else is nobody's.
OWNERS = {1: "a", 2: "a", 3: "b", 2**63 + 1: "b"}


def random_pieces(rng: random.Random, stream: bytes, sizes: tuple[int, ...]) -> Iterator[bytes]:
    while stream:
        size = rng.choice(sizes)
        yield stream[:size]
        stream = stream[size:]


# Output: a naive reading ------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What `gather` has to find."""

    runs: dict[str, list[bytes]] = field(default_factory=dict)
    strays: list[tuple[int, int]] = field(default_factory=list)
    stop: int = 0
    lost: bool = False


def read_naively(data: bytes, start: int, stop: int) -> Expected:
    expected = Expected(stop=start)
    before = None
    while stop - expected.stop >= 12:
        seq, length = struct.unpack_from(">QI", data, expected.stop)
        expected.lost = not 12 <= length <= LONGEST
        if expected.lost or length > stop - expected.stop:
            break
        owner = OWNERS.get(seq)
        whole = data[expected.stop : expected.stop + length]
        if owner is None:
            expected.strays.append((seq, length))
        elif owner == before:
            expected.runs[owner][-1] += whole
        else:
            expected.runs.setdefault(owner, []).append(whole)
        before = owner
        expected.stop += length
    return expected


def gathered(data: bytes, start: int = 0, stop: int | None = None) -> Batch[str]:
    buffer = bytearray(data)
    return gather(buffer, memoryview(buffer), start, len(data) if stop is None else stop, OWNERS)


def check_slices(pieces: Sequence[memoryview], most: int) -> None:
    """Each is of whole frames, and can be sent all at once or not at all; and they are few."""
    assert len(pieces) <= most
    for piece in pieces:
        pos = frames = 0
        while pos < len(piece):
            pos += struct.unpack_from(">QI", piece, pos)[1]
            frames += 1
        assert pos == len(piece)
        assert pos <= MOST_IN_SLICE or frames == 1


def check(data: bytes, start: int = 0, stop: int | None = None) -> Batch[str]:
    """`gather` finds in `data` what the naive reading finds."""
    batch = gathered(data, start, stop)
    expected = read_naively(data, start, len(data) if stop is None else stop)
    runs = {owner: b"".join(pieces) for owner, pieces in batch.slices.items() if pieces}
    assert runs == {owner: b"".join(pieces) for owner, pieces in expected.runs.items()}
    for owner, pieces in batch.slices.items():
        check_slices(pieces, sum(-(-len(run) // 10_000) for run in expected.runs.get(owner, ())))
    assert batch.strays == expected.strays
    assert batch.stop == expected.stop
    assert (batch.error is not None) == expected.lost
    return batch


def test_the_limits_are_these() -> None:
    assert (HEADER_SIZE, MAX_TO_AGENT, MAX_FROM_AGENT) == (12, 4_096, 10_240)


def test_nothing() -> None:
    batch = gathered(b"")
    assert (batch.slices, batch.strays, batch.stop, batch.error) == ({}, [], 0, None)


def test_the_output_of_a_process() -> None:
    stream = frame(3, b"A\n") + frame(4, b"B\n") + frame(3) + frame(3, b"\x07")
    batch = gathered(stream)
    assert {owner: [bytes(piece) for piece in pieces] for owner, pieces in batch.slices.items()} == {
        "b": [frame(3, b"A\n"), frame(3) + frame(3, b"\x07")]
    }
    assert batch.strays == [(4, 14)]
    assert batch.stop == len(stream)


def test_neighbours_of_one_owner_are_one_slice_whatever_their_seqs() -> None:
    stream = frame(1, b"out") + frame(2, b"err") + frame(1) + frame(3, b"x") + frame(2, b"y")
    batch = gathered(stream)
    assert {owner: list(map(len, pieces)) for owner, pieces in batch.slices.items()} == {
        "a": [42, 13],
        "b": [13],
    }


@pytest.mark.parametrize("seqs", [(1,), (1, 3)], ids=["one", "two"])
def test_row_of_frames_that_are_longer_than_a_slice(seqs: tuple[int, ...]) -> None:
    frames = [frame(seqs[number % len(seqs)], bytes(40_000)) for number in range(40)]
    batch = gathered(b"".join(frames))
    assert (batch.frames, batch.error) == (40, None)
    pieces = [piece for pieces in batch.slices.values() for piece in pieces]
    assert list(map(len, pieces)) == [40_012] * 40


def test_slices_are_the_buffers_own_bytes() -> None:
    buffer = bytearray(frame(1, b"abc"))
    [piece] = gather(buffer, memoryview(buffer), 0, len(buffer), OWNERS).slices["a"]
    buffer[-1:] = b"!"
    assert bytes(piece) == frame(1, b"ab!")


def test_only_what_lies_between_start_and_stop_counts() -> None:
    stream = frame(1, b"abc") + frame(3, b"x") + frame(1, b"defg")
    for start in (0, 15, 28):
        for stop in range(start, len(stream) + 1):
            check(stream, start, stop)


@pytest.mark.parametrize("last", [frame(1, b"abc"), frame(3, b"abc"), frame(9, b"abc")])
def test_a_last_frame_that_is_not_whole_waits(last: bytes) -> None:
    for cut in range(len(last)):
        assert check(frame(1, b"x") + last[:cut]).stop == 13


def test_an_owner_of_nothing_but_an_unfinished_frame_is_not_mentioned() -> None:
    assert "b" not in gathered(frame(1, b"x") + frame(3, b"abc")[:-1]).slices


@pytest.mark.parametrize("length", [0, 1, 11, LONGEST + 1, 2**31, 2**32 - 1])
def test_lost_framing_is_named_and_what_came_before_it_found(length: int) -> None:
    for before in (b"", frame(1, b"x"), frame(9, b"x"), frame(1) * 50):
        for seq in (1, 3, 9):
            batch = check(before + frame(seq, b"abc", length=length))
            assert batch.stop == len(before)
            assert batch.error is not None
            assert str(seq) in batch.error
            assert str(length) in batch.error


@pytest.mark.parametrize("seq", [1, 9])
def test_the_longest_frame_and_one_byte_more(seq: int) -> None:
    """How much of a frame has arrived does not decide whether it is too long."""
    longest = frame(seq, bytes(LONGEST - 12))
    too_long = frame(seq, bytes(LONGEST + 1 - 12))
    for behind in (b"", frame(1)[:-1], frame(1) * 10_000):
        assert check(longest + behind).error is None
        assert check(too_long[:-1]).error is not None
        assert check(too_long + behind).error is not None


def test_frames_as_long_as_the_agent_makes_them() -> None:
    check(frame(1, bytes(10_228)) * 5 + frame(3, bytes(10_228)) + frame(1, bytes(10_228))[:-1])


# Output: rows of frames of one size -------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [1, 3, 9])
def test_rows(seq: int) -> None:
    tails = (b"", frame(seq)[:11], frame(seq, b"x" * 70)[:-1], frame(2), frame(3), frame(9, b"x"))
    for count, size in itertools.product((1, 2, 30, 31, 32, 33, 34, 35, 64, 100), (0, 1, 64)):
        row = frame(seq, b"\x01" * size) * count
        for tail in tails:
            check(row + tail)
            check(frame(2) + row + tail + row)


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0" * 12, bytes([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 24])])
def test_rows_of_which_one_differs_in_one_byte_of_its_header(payload: bytes) -> None:
    """Payloads that look like headers do not hide where a row ends."""
    plain = frame(1, payload)
    for offset, at in itertools.product(range(12), (0, 1, 2, 3, 7, 31, 32, 38, 39)):
        for flip in (0x01, 0x03, 0x80, 0xFF):
            row = bytearray(plain * 40)
            row[at * len(plain) + offset] ^= flip
            check(bytes(row))
            check(bytes(row) + plain * 40)


def test_rows_of_which_some_frames_are_a_little_longer_or_shorter() -> None:
    for size in (0, 1, 12):
        for other in (0, 1, 2, 11, 12, 13):
            for at in range(0, 80, 3):
                stream = (
                    frame(1, bytes(size)) * at + frame(1, bytes(other)) + frame(1, bytes(size)) * (80 - at)
                )
                check(stream)


def test_rows_of_two_streams_of_one_owner() -> None:
    for length in range(1, 70, 4):
        check((frame(1, b"x") * length + frame(2, b"x") * length) * 3)


def test_random_streams() -> None:
    rng = random.Random(5)
    for _ in range(300):
        check(random_stream(rng))


def random_stream(rng: random.Random) -> bytes:
    """Rows, mostly; sometimes with a byte that is not what it was, or cut off."""
    parts = []
    for _ in range(rng.randrange(12)):
        seq = rng.choice((1, 1, 2, 3, 9, 2**63, 2**63 + 1, 2**64 - 1))
        payload = rng.choice((b"", b"\0", b"x" * 5, bytes(12), frame(1), rng.randbytes(40)))
        parts.append(frame(seq, payload) * rng.choice((1, 1, 2, 3, 31, 33, 70)))
    stream = bytearray(b"".join(parts))
    if stream and rng.random() < 0.3:
        stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.5:
        del stream[len(stream) - rng.randrange(min(20, len(stream) + 1)) :]
    return bytes(stream)


def test_random_streams_in_random_pieces() -> None:
    """The way a pump reads: what is not whole yet is moved to the front."""
    rng = random.Random(6)
    for _ in range(100):
        stream = random_stream(rng)
        buffer = bytearray(len(stream) + 1)
        view = memoryview(buffer)
        got: dict[str, bytes] = {}
        strays: list[tuple[int, int]] = []
        lost = False
        held = done = 0
        for piece in random_pieces(rng, stream, (1, 11, 12, 13, 200, 3_000)):
            buffer[held : held + len(piece)] = piece
            batch = gather(buffer, view, 0, held + len(piece), OWNERS)
            for owner, pieces in batch.slices.items():
                got[owner] = got.get(owner, b"") + b"".join(pieces)
            strays += batch.strays
            done += batch.stop
            held += len(piece) - batch.stop
            buffer[:held] = buffer[batch.stop : batch.stop + held]
            lost = batch.error is not None
            if lost:
                break
        expected = read_naively(stream, 0, len(stream))
        assert got == {owner: b"".join(runs) for owner, runs in expected.runs.items() if b"".join(runs)}
        assert (strays, done, lost) == (expected.strays, expected.stop, expected.lost)


# Input: a naive reading -------------------------------------------------------------------------------------

MINE = 7


@dataclass
class Said:
    """What a client has said so far: payload, and where in it end of file came."""

    payload: bytes = b""
    ends: list[int] = field(default_factory=list)
    last_is_end: bool = False
    wrong: bool = False

    @classmethod
    def by(cls, stream: bytes) -> Said:
        """What its bytes mean, a payload that is still arriving included."""
        said = cls()
        while len(stream) >= 12 and not said.wrong:
            seq, length = struct.unpack_from(">QI", stream)
            said.wrong = seq != MINE or length < 12
            if not said.wrong:
                said.add(stream[12:length], end=length == 12)
                stream = stream[length:]
        return said

    def add(self, payload: bytes, *, end: bool) -> None:
        self.payload += payload
        if end:
            self.ends.append(len(self.payload))
        if end or payload:
            self.last_is_end = end


def frames_in(data: bytes) -> Iterator[bytes]:
    """The frames in `data`, all of which are whole and such as the agent takes."""
    while data:
        seq, length = struct.unpack_from(">QI", data)
        assert seq == MINE
        assert 12 <= length <= min(4_096, len(data))
        yield data[:length]
        data = data[length:]


def check_split(pieces: Iterable[bytes]) -> StdinSplitter:
    """After each piece, what went out says what came in: all of it, in frames that the agent takes."""
    splitter = StdinSplitter(MINE)
    came = b""
    went = Said()
    for piece in pieces:
        came += piece
        buffer = bytearray(b"before" + piece + b"behind")
        out = b"".join(split(splitter, buffer, 6, 6 + len(piece)))
        assert buffer.startswith(b"before")
        assert buffer.endswith(b"behind")
        for whole in frames_in(out):
            went.add(whole[12:], end=len(whole) == 12)
        expected = Said.by(came)
        assert (went.payload, went.ends) == (expected.payload, expected.ends)
        assert splitter.payload_bytes == len(expected.payload)
        assert splitter.at_eof == expected.last_is_end
        assert (splitter.error is not None) == expected.wrong
    return splitter


def split_one(data: bytes) -> bytes:
    buffer = bytearray(data)
    return b"".join(split(StdinSplitter(MINE), buffer, 0, len(data)))


def test_no_input() -> None:
    splitter = check_split([b"", b""])
    assert (splitter.payload_bytes, splitter.at_eof, splitter.error) == (0, False, None)


@pytest.mark.parametrize(
    "stream",
    [
        frame(MINE, b"line1\n"),
        frame(MINE),
        frame(MINE, b"a") + frame(MINE),
        frame(MINE) + frame(MINE) + frame(MINE, b"a"),
        frame(MINE, b"a" * 30) + frame(MINE, b"b") + frame(MINE, b"c" * 12) + frame(MINE),
        frame(MINE, frame(8) * 2) + frame(MINE, frame(MINE)),
    ],
)
def test_input_in_whatever_pieces(stream: bytes) -> None:
    assert split_one(stream) == stream
    for pieces in splits(stream):
        check_split(pieces)


@pytest.mark.parametrize("size", [1, 4_083, 4_084])
def test_a_frame_the_agent_can_take_passes_as_it_is(size: int) -> None:
    stream = frame(MINE, b"x" * size) + frame(MINE)
    assert split_one(stream) == stream


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (4_085, [4_084, 1]),
        (8_168, [4_084, 4_084]),
        (8_169, [4_084, 4_084, 1]),
        # What clients in the field send: 8,192 in total.
        (8_180, [4_084, 4_084, 12]),
        (100_000, [4_084] * 24 + [1_984]),
    ],
)
def test_a_longer_one_is_cut(size: int, sizes: list[int]) -> None:
    payload = random.Random(7).randbytes(size)
    ends = itertools.accumulate(sizes)
    expected = b"".join(frame(MINE, payload[end - size : end]) for size, end in zip(sizes, ends, strict=True))
    assert split_one(frame(MINE, payload)) == expected
    assert split_one(frame(MINE, b"a") + frame(MINE, payload) + frame(MINE)) == (
        frame(MINE, b"a") + expected + frame(MINE)
    )


@pytest.mark.parametrize(
    "sizes", [(4_085,), (8_168,), (8_180,), (8_192,), (4_085, 8_168, 10_228, 4_084, 20_000)]
)
def test_long_ones_in_a_row_fill_frames_together(sizes: tuple[int, ...]) -> None:
    chance = random.Random(7)
    payloads = [chance.randbytes(size) for size in sizes * (40 // len(sizes))]
    stream = b"".join(frame(MINE, payload) for payload in payloads)
    splitter = check_split([stream, frame(MINE)])
    assert splitter.payload_bytes == sum(map(len, payloads))
    for size in (5_000, 8_204, 65_536):
        check_split([stream[pos : pos + size] for pos in range(0, len(stream), size)])


def test_long_ones_in_a_row_make_two_pieces_each() -> None:
    payload = random.Random(7).randbytes(8_192)
    buffer = bytearray(frame(MINE, payload) * 30)
    splitter = StdinSplitter(MINE)
    pieces = split(splitter, buffer, 0, len(buffer))
    assert len(pieces) < 2 * 30 + 8
    assert splitter.frames == -(-30 * 8_192 // 4_084) == len(list(frames_in(b"".join(pieces))))


def test_a_payload_that_is_still_arriving_goes_on_as_far_as_it_has() -> None:
    splitter = StdinSplitter(MINE)
    stream = frame(MINE, b"abcdef")
    out = []
    for start, stop in ((0, 5), (5, 12), (12, 14), (14, 14), (14, 17), (17, 18)):
        buffer = bytearray(stream[start:stop])
        out.append(b"".join(split(splitter, buffer, 0, stop - start)))
    assert out == [b"", b"", frame(MINE, b"ab"), b"", frame(MINE, b"cde"), frame(MINE, b"f")]


def test_a_frame_of_4_gib_goes_on_as_it_comes() -> None:
    splitter = StdinSplitter(MINE)
    buffer = bytearray(frame(MINE, b"x" * 20, length=2**32 - 1))
    assert b"".join(split(splitter, buffer, 0, 32)) == frame(MINE, b"x" * 20)
    assert splitter.error is None


WRONG = [
    pytest.param(frame(MINE + 1, b"abc"), id="the next stream"),
    pytest.param(frame(MINE - 1), id="the one before"),
    pytest.param(frame(0, b"abc"), id="0"),
    pytest.param(frame(MINE + 2**63), id="a marker"),
    pytest.param(frame(MINE + 2**32, b"abc"), id="the same low half"),
    pytest.param(frame(MINE << 8, b"abc"), id="shifted"),
    pytest.param(frame(MINE, b"abc", length=11), id="length 11"),
    pytest.param(frame(MINE, b"abc", length=0), id="length 0"),
    pytest.param(frame(MINE + 1, b"abc", length=2**32 - 1), id="another stream and 4 GiB"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_goes_on_of_a_frame_that_is_not_the_clients_to_send(wrong: bytes) -> None:
    for before in (b"", frame(MINE, b"ok"), frame(MINE)):
        stream = before + wrong + frame(MINE, b"late")
        assert split_one(stream) == before
        for pieces in splits(stream):
            assert check_split(pieces).error, pieces
    row = frame(MINE, b"x") * 40
    assert split_one(row + wrong) == row
    assert check_split([frame(MINE, b"ok"), wrong, frame(MINE, b"late"), frame(MINE)]).payload_bytes == 2


def test_the_error_names_what_is_wrong() -> None:
    assert "99" in (check_split([frame(99, b"abc")]).error or "")
    assert "11" in (check_split([frame(MINE, length=11)]).error or "")


@pytest.mark.parametrize("size", [0, 1, 64])
def test_rows_of_input(size: int) -> None:
    unfinished = frame(MINE, b"xy")[:-1]
    for count in (31, 32, 33, 34, 64, 100):
        row = frame(MINE, bytes(size)) * count
        for tail in (b"", unfinished, unfinished[:5], frame(MINE), frame(MINE, bytes(5_000)), frame(8)):
            check_split([row + tail])
            check_split([frame(MINE, b"x") + row + tail, row])


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0" * 12])
def test_rows_of_input_of_which_one_differs_in_one_byte_of_its_header(payload: bytes) -> None:
    plain = frame(MINE, payload)
    for offset, at in itertools.product(range(12), (0, 1, 2, 3, 31, 32, 38, 39)):
        for flip in (0x01, 0x03, 0x80, 0xFF):
            row = bytearray(plain * 40)
            row[at * len(plain) + offset] ^= flip
            check_split([bytes(row) + plain * 40])


def test_random_input_in_random_pieces() -> None:
    rng = random.Random(8)
    for _ in range(150):
        parts = []
        for _ in range(rng.randrange(10)):
            payload = rng.choice(
                (b"", b"\0", bytes(12), frame(MINE), rng.randbytes(40), rng.randbytes(4_085))
            )
            parts.append(frame(MINE, payload) * rng.choice((1, 1, 2, 3, 33)))
        stream = bytearray(b"".join(parts))
        if stream and rng.random() < 0.3:
            stream[rng.randrange(min(600, len(stream)))] ^= 1 << rng.randrange(8)
        sizes = rng.choice(((500, 512, 4_096, 9_000), (100_000,), (3, 12, 13, 2_000)))
        check_split(random_pieces(rng, bytes(stream), sizes))


# What hostile streams cost ----------------------------------------------------------------------------------

COST = 96 * 1024


def fill(unit: bytes) -> bytearray:
    return bytearray(unit * (COST // len(unit)))


def timed(action: Callable[[bytearray], object], unit: bytes) -> float:
    buffer = fill(unit)
    return cpu_seconds(lambda: action(buffer))


@pytest.mark.parametrize(("row", "size"), [(2, 0), (3, 1)])
@pytest.mark.parametrize("seqs", [(1, 3), (1, 2)], ids=["two owners", "one owner"])
def test_short_rows_cost_little_more_than_none(seqs: tuple[int, int], row: int, size: int) -> None:
    """Two processes that take turns may not hold up everybody: nothing else runs meanwhile."""

    def run(buffer: bytearray) -> None:
        gather(buffer, memoryview(buffer), 0, len(buffer), OWNERS)

    one, other = (frame(seq, bytes(size)) for seq in seqs)
    assert timed(run, one * row + other * row) < 20 * timed(run, one + other) + 0.002


@pytest.mark.parametrize("row", [2, 3])
def test_short_rows_of_input_cost_little_more_than_none(row: int) -> None:
    def run(buffer: bytearray) -> None:
        split(StdinSplitter(MINE), buffer, 0, len(buffer))

    one, other = frame(MINE), frame(MINE, bytes(4))
    assert timed(run, one * row + other * row) < 20 * timed(run, one + other) + 0.002
