"""Whose turn it is."""

from __future__ import annotations

import threading
import time

from cc_proxy.proxy.turns import Turns, Waiter
from tests.wire.support import WAIT, wait_until


def test_turn_that_comes_at_the_last_moment_is_had_once_it_is_passed_on() -> None:
    """Else two threads would have it: the one that passes it on has something to do before that."""
    turns, waiter = Turns[Waiter](), Waiter()
    assert turns.take()
    got = threading.Event()

    def get() -> None:
        assert turns.get(waiter, time.monotonic() + 0.2)
        got.set()

    thread = threading.Thread(target=get)
    thread.start()
    wait_until(waiter.turn.locked, "it is in line")
    assert turns.next() is waiter
    assert not got.wait(0.4)
    waiter.turn.release()
    assert got.wait(WAIT)
    thread.join(WAIT)
    assert turns.next() is None


def test_turn_that_does_not_come_in_time_is_somebody_elses() -> None:
    turns, late = Turns[Waiter](), Waiter()
    assert turns.take()
    assert not turns.get(late, time.monotonic())
    assert turns.next() is None
    assert turns.take()
