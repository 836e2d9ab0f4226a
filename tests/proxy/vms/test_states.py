"""A VM's life: which moves are legal, and who is told."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from cc_proxy.continuity.cells import State
from cc_proxy.proxy.vms.states import Life
from tests.wire.support import WAIT, in_background

LEGAL = {
    (State.STARTING, State.UP),
    (State.STARTING, State.LOST),
    (State.STARTING, State.GONE),
    (State.UP, State.LEAVING),
    (State.UP, State.LOST),
    (State.UP, State.GONE),
    (State.LEAVING, State.LOST),
    (State.LEAVING, State.GONE),
    (State.LOST, State.GONE),
}


#: How a new life gets to each state.
WAYS: dict[State, list[State]] = {
    State.STARTING: [],
    State.UP: [State.UP],
    State.LEAVING: [State.UP, State.LEAVING],
    State.LOST: [State.LOST],
    State.GONE: [State.GONE],
}


@pytest.mark.parametrize("at", list(State))
def test_moves(at: State) -> None:
    """An illegal move changes nothing."""
    for to in State:
        life = Life()
        for step in WAYS[at]:
            assert life.move(step)
        legal = (at, to) in LEGAL
        assert life.move(to) == legal
        assert life.state is (to if legal else at)


def test_of_many_threads_that_lose_it_one_does() -> None:
    for _ in range(50):
        lost: list[bool | None] = []
        life = Life()
        barrier = threading.Barrier(4)

        def lose(
            life: Life = life, barrier: threading.Barrier = barrier, lost: list[bool | None] = lost
        ) -> None:
            barrier.wait(WAIT)
            lost.append(life.lose("for a reason"))

        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(in_background(lose))
        assert sorted(lost, key=str) == [False, None, None, None]
