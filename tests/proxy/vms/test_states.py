"""A VM's life: which moves are legal, and who is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from cc_proxy.continuity.cells import AT_STATE, CELL_SIZE, State
from cc_proxy.proxy.vms.kept import KeptVm
from cc_proxy.proxy.vms.states import Life, VmError
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


class KeptStates(KeptVm):
    """Where a VM is as the next process would find it."""

    def __init__(self) -> None:
        super().__init__()
        self._slot.cell = memoryview(bytearray(CELL_SIZE)).cast("Q")
        self.meanwhile: Callable[[], object] = lambda: None

    def note_state(self, state: State) -> None:
        self.meanwhile()
        super().note_state(state)

    @property
    def state(self) -> State | None:
        value = self._slot.cell[AT_STATE]
        return State(value) if value else None


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([], None),
        ([State.LOST, State.GONE], None),
        ([State.UP], State.UP),
        ([State.UP, State.LOST], State.LOST),
        ([State.UP, State.LEAVING, State.LOST], State.LEAVING),
        ([State.UP, State.LEAVING, State.GONE], State.LEAVING),
    ],
)
def test_to_the_next_process_only_what_was_up_and_no_bye_was_said_for_has_an_id(
    steps: list[State], left: State | None
) -> None:
    kept = KeptStates()
    life = Life(kept)
    for step in steps:
        assert life.move(step)
        life.note_health(is_well=True)
    assert kept.state is left


def test_pump_that_hangs_is_lost_to_the_next_process_until_it_is_well() -> None:
    kept = KeptStates()
    life = Life(kept)
    life.move(State.UP)
    for _ in range(2):
        life.note_health(is_well=False)
        assert [kept.state, life.state] == [State.LOST, State.UP]
        life.note_health(is_well=True)
        assert [kept.state, life.state] == [State.UP, State.UP]


def test_state_is_not_kept_after_a_newer_one() -> None:
    """The watchdog has seen that it is up, and its pump loses it before that is noted."""
    kept = KeptStates()
    life = Life(kept)
    life.move(State.UP)
    loser = threading.Thread(target=lambda: life.lose("for a reason"))

    def lose() -> None:
        kept.meanwhile = lambda: None
        loser.start()
        loser.join(0.05)

    kept.meanwhile = lose
    life.note_health(is_well=True)
    loser.join(WAIT)
    assert kept.state is State.LOST


def test_seqs_are_handed_out_only_while_it_can_be_used() -> None:
    life = Life()
    with pytest.raises(VmError):
        life.take_seqs(1)
    life.move(State.UP)
    assert life.take_seqs(2) == range(1, 3)
    life.move(State.LEAVING)
    assert life.take_seqs(1) == range(3, 4)
    life.lose("for a reason")
    with pytest.raises(VmError, match="for a reason"):
        life.take_seqs(1)
    assert life.next_seq == 4
