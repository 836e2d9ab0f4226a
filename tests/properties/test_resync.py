"""Where frames begin, in a stream of which a part was missed."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cc_proxy.hyperstart.frames import MAX_FROM_AGENT
from cc_proxy.hyperstart.resync import Resync, Unrecognisable
from cc_proxy.hyperstart.state import ResyncState
from tests.properties.support import cuts, pieces_of
from tests.slow import frame

NEXT_SEQ = 300
PROBE = 2**63 + 0x1234_5678_9ABC_DEF0
LONGEST = MAX_FROM_AGENT - 12

seqs = st.integers(1, NEXT_SEQ - 1)


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def other_frames(size: int, seed: int) -> bytes:
    """As of somebody who prints what the agent sends."""
    rng = random.Random(seed)
    one = frame(rng.randrange(1, NEXT_SEQ), bytes(rng.randrange(60)))
    return (one * (size // len(one) + 1))[:size]


def headers(size: int, seed: int) -> bytes:
    """Headers as close together as they can be; what they promise is wrong, but possible."""
    rng = random.Random(seed)
    found = (frame(rng.randrange(1, NEXT_SEQ), b"", rng.randrange(12, 2_000)) for _ in range(size // 12 + 1))
    return b"".join(found)[:size]


sizes = st.integers(0, 40) | st.integers(0, LONGEST) | st.just(LONGEST)
payloads = st.builds(
    lambda make, size, seed: make(size, seed),
    st.sampled_from([noise, other_frames, headers, lambda size, _seed: bytes(size)]),
    sizes,
    st.integers(0, 9),
)
markers = st.builds(frame, st.integers(2**63, 2**63 + 9), st.sampled_from([b"", b"\1"]))
some_frames = st.lists(st.builds(frame, seqs, payloads) | markers, min_size=1, max_size=12)
plain_frames = st.builds(frame, seqs, st.builds(noise, sizes, st.integers(0, 9)))


def resync(pieces: Iterable[bytes]) -> tuple[int, bytes] | None:
    """How much had been received when it was certain, and what there was from there on."""
    found = Resync(ResyncState(NEXT_SEQ, PROBE))
    received = 0
    for piece in pieces:
        received += len(piece)
        rest = found.receive(piece)
        if rest is not None:
            return received, rest
    return None


@given(some_frames, st.integers(0, 999), cuts)
@example([frame(1, frame(2) * 800)] * 4, 1, [])
@example([frame(1, frame(2, bytes(88), 112))] * 300, 0, [5, 10])
def test_whatever_is_sent_no_place_is_taken_for_a_beginning_that_is_none(
    frames: list[bytes], begin: int, where: list[int]
) -> None:
    """Even if all payload is made to look like frames: what is one is always among the places left."""
    stream = b"".join(frames)
    beginnings = set(accumulate(map(len, frames), initial=0))
    missed = begin * len(stream) // 1000
    found = resync(pieces_of(stream[missed:], where))
    if found:
        received, rest = found
        assert missed + received - len(rest) in beginnings
        assert stream[missed:][:received].endswith(rest)


@given(st.lists(plain_frames, min_size=1, max_size=8), st.integers(0, 999), cuts)
def test_it_takes_two_of_the_longest_frames_to_be_certain(
    frames: list[bytes], begin: int, where: list[int]
) -> None:
    missed = begin * len(frames[0]) // 1000
    stream = b"".join(frames)[missed:] + frame(1, noise(LONGEST, 1)) * 3
    found = resync(pieces_of(stream, where))
    assert found
    received, rest = found
    assert received - len(rest) <= 2 * MAX_FROM_AGENT


@given(some_frames, st.integers(0, 999), cuts, st.sampled_from([b"", b"\1"]))
def test_the_probe_makes_it_certain_at_once(
    frames: list[bytes], begin: int, where: list[int], payload: bytes
) -> None:
    before = b"".join(frames)
    missed = begin * len(before) // 1000
    stream = before[missed:] + frame(PROBE, payload)
    found = resync(pieces_of(stream, where))
    assert found
    received, rest = found
    assert stream[:received].endswith(rest)
    if rest and len(stream) - len(frame(PROBE, payload)) < MAX_FROM_AGENT:
        assert frame(PROBE, payload).startswith(rest)


def test_what_stays_open_takes_no_memory() -> None:
    """Each frame has something in it that looks like another one, and leads to such a thing in the next."""
    stream = frame(1, frame(2, bytes(88), 112)) * 2_000
    tracemalloc.start()
    try:
        found = Resync(ResyncState(NEXT_SEQ, PROBE))
        for _ in range(5):
            assert found.receive(stream) is None
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 3 * len(stream) + 500_000
    finally:
        tracemalloc.stop()
    assert found.receive(frame(PROBE)) == frame(PROBE)


@pytest.mark.parametrize("what", [b"\xff" * 20_000, frame(NEXT_SEQ, noise(100, 1)) * 200, bytes(20_000)])
def test_what_no_agent_sends_is_no_stream(what: bytes) -> None:
    with pytest.raises(Unrecognisable):
        resync([what])
