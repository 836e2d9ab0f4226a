"""Lossless stdin: never more on its way than the agent keeps, and markers that say so."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest

from cc_proxy.hyperstart.pacing import FIRST_MARKER, StdinWindow, marked_stream
from tests.api.support import frame

WINDOW = 512


def seq_of(marker: bytes | None) -> int:
    """The seq of a marker, which is an empty frame on a seq that is never a stream's."""
    assert marker is not None
    seq = int.from_bytes(marker[:8], "big")
    assert marker == frame(seq)
    assert seq >= 2**63
    return seq


def test_markers_begin_where_no_stream_is() -> None:
    assert FIRST_MARKER == 2**63


def test_the_first_marker_is_the_stream_and_2_to_the_63() -> None:
    for io_base in (1, 2, 65_536, 2**32, 2**47):
        assert StdinWindow(io_base, WINDOW).sent(WINDOW) == frame(2**63 + io_base)


@pytest.mark.parametrize("io_base", [1, 2**47])
def test_every_marker_says_whose_it_is(io_base: int) -> None:
    window = StdinWindow(io_base, WINDOW)
    seqs = []
    for _ in range(40_000):
        seqs.append(seq_of(window.sent(WINDOW)))
        assert seq_of(window.ask_again()) == seqs[-1]
        assert window.echoed(seqs[-1])
    assert {marked_stream(seq) for seq in seqs} == {io_base}
    assert all(one != next_one for one, next_one in itertools.pairwise(seqs)), "copies are on their way"


def test_typing_costs_no_markers() -> None:
    window = StdinWindow(1, WINDOW)
    assert window.room == WINDOW
    for typed in range(1, 256):
        assert window.sent(1) is None
        assert window.room == WINDOW - typed
        assert not window.asked
    assert window.sent(1) is not None
    assert window.asked
    assert window.room == 0


@pytest.mark.parametrize(
    ("payload", "asks"), [(0, False), (1, False), (255, False), (256, True), (512, True)]
)
def test_half_a_window_asks_for_a_marker(payload: int, asks: bool) -> None:
    window = StdinWindow(1, WINDOW)
    assert (window.sent(payload) is not None) == asks
    assert window.room == (0 if asks else WINDOW - payload)


def test_its_echo_makes_room() -> None:
    window = StdinWindow(1, WINDOW)
    seq = seq_of(window.sent(300))
    assert window.echoed(seq)
    assert (window.room, window.asked) == (WINDOW, 0)
    assert not window.echoed(seq)


@pytest.mark.parametrize("seq", [0, 1, 2**63, 2**63 + 2, 2**64 - 1, 2**63 + (1 << 48) + 1])
def test_another_echo_makes_none(seq: int) -> None:
    window = StdinWindow(1, WINDOW)
    assert not window.echoed(seq)
    window.sent(300)
    assert not window.echoed(seq)
    assert window.room == 0
    assert window.asked == 1


def test_an_echo_before_it_was_asked_for_makes_none() -> None:
    window = StdinWindow(1, WINDOW)
    window.sent(100)
    assert not window.echoed(2**63 + 1)
    assert window.room == WINDOW - 100


def test_whichever_of_two_copies_comes_back_counts_once() -> None:
    window = StdinWindow(1, WINDOW)
    seq = seq_of(window.sent(WINDOW))
    assert seq_of(window.ask_again()) == seq
    assert window.asked == 2
    assert window.echoed(seq)
    assert (window.room, window.asked) == (WINDOW, 0)
    assert not window.echoed(seq)


def test_a_late_copy_of_a_marker_is_none_of_the_next_one() -> None:
    window = StdinWindow(1, WINDOW)
    first = seq_of(window.sent(WINDOW))
    assert window.echoed(seq_of(window.ask_again()))
    third = seq_of(window.sent(WINDOW))
    assert not window.echoed(first)
    assert window.room == 0
    assert window.echoed(third)


def test_after_a_reset_no_older_marker_counts() -> None:
    """Its echo may only be late."""
    window = StdinWindow(1, WINDOW)
    late = [seq_of(window.sent(WINDOW)), seq_of(window.ask_again()), seq_of(window.ask_again())]
    window.reset()
    assert (window.room, window.asked) == (WINDOW, 0)
    marker = seq_of(window.sent(WINDOW))
    assert not any(window.echoed(seq) for seq in late)
    assert window.room == 0
    assert window.echoed(marker)


@pytest.mark.parametrize("size", [1, 2, 3, 511, 512, 1_048_576])
def test_windows_of_any_size_let_everything_through(size: int) -> None:
    window = StdinWindow(1, size)
    for _ in range(5):
        while room := window.room:
            assert room <= size
            marker = window.sent(min(room, max(1, size // 3)))
        assert window.echoed(seq_of(marker))


def test_an_agent_that_loses_echoes_and_a_process_that_loses_nothing() -> None:
    """It throws away what does not fit and echoes when it likes: with the window kept, it all fits."""
    rng = random.Random(9)
    for _ in range(50):
        window = StdinWindow(1, WINDOW)
        channel: deque[int | bytes] = deque()
        echoes: deque[int] = deque()
        stdin = sent = taken = lost = 0
        while taken + lost < 5_000:
            if sent < 5_000 and window.room:
                size = min(rng.randrange(1, window.room + 1), 5_000 - sent)
                marker = window.sent(size)
                sent += size
                channel += [size] if marker is None else [size, marker]
            match rng.randrange(4):
                case 0 if channel:
                    item = channel.popleft()
                    if isinstance(item, bytes):
                        # What came before is handled: given to the process.
                        taken, stdin = taken + stdin, 0
                        if rng.random() < 0.7:
                            echoes.append(seq_of(item))
                    else:
                        lost += max(0, stdin + item - WINDOW)
                        stdin = min(WINDOW, stdin + item)
                case 1 if echoes:
                    window.echoed(echoes.popleft())
                case 2 if window.asked and rng.random() < 0.3:
                    channel.append(window.ask_again())
                case 3 if sent == 5_000 and not channel:
                    taken, stdin = taken + stdin, 0
        assert (taken, lost) == (5_000, 0)


def test_window_becomes_wider_and_never_narrower() -> None:
    window = StdinWindow(1, WINDOW)
    window.sent(100)
    window.widen(1000)
    assert window.room == 900
    window.widen(WINDOW)
    assert window.room == 900
    assert window.sent(399) is None
    assert window.sent(1) is not None
    assert window.room == 0
