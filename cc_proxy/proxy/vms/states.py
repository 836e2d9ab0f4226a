"""A VM's life: its state, the states that can come next, and what went wrong."""

import threading
import time
from typing import NamedTuple, Self

from cc_proxy.continuity.cells import State
from cc_proxy.continuity.state.vms import LifeState, TroubleState
from cc_proxy.proxy.vms.kept import KeptVm


class VmError(Exception):
    """Something failed in a VM; the text tells clients the cause."""


#: The states that can come after each.
MOVES = {
    State.STARTING: {State.UP, State.LOST, State.GONE},
    State.UP: {State.LEAVING, State.LOST, State.GONE},
    State.LEAVING: {State.LOST, State.GONE},
    State.LOST: {State.GONE},
    State.GONE: set[State](),
}


class Trouble(NamedTuple):
    """What went wrong, and when (`time.monotonic`)."""

    text: str
    at: float

    @classmethod
    def from_state(cls, state: TroubleState) -> Self:
        """Return the trouble that `state` described."""
        return cls(state.text, time.monotonic() - state.age)

    def state(self) -> TroubleState:
        """Return it as a value, for `from_state`."""
        return TroubleState(self.text, time.monotonic() - self.at)


class FailedVm(NamedTuple):
    """What is remembered of a VM that failed."""

    container_id: str
    owner: int
    trouble: Trouble


class Life:
    """One VM's life. Any thread may call its methods and read its attributes."""

    def __init__(self, kept: KeptVm | None = None) -> None:
        """`kept` is told of each new state, and of the seqs that are handed out."""
        # Guards changes of what follows, and of what is kept of it. Reading a single value takes no lock.
        # Innermost.
        self._lock = threading.Lock()
        self._kept = kept or KeptVm()
        self.state = State.STARTING
        #: Why it was lost; empty if it was not.
        self.cause = ""
        #: Whether something went wrong that ended it, or kept it from coming up.
        self.failed = False
        #: Whether it was ever up.
        self.came_up = False
        #: The last thing that went wrong. Any thread replaces it as a whole.
        self.trouble: Trouble | None = None
        #: The first seq that has not been handed out. The thread that brings the VM up sets it before that.
        self.next_seq = 1
        self._ends = 0  # how many reasons there are that would make its end no failure

    def hand_over(self, state: State) -> LifeState:
        """Return it as a value, for `restore`, with this state."""
        trouble = self.trouble.state() if self.trouble else None
        return LifeState(state.name, self.cause, trouble, self.failed, self.came_up, self._ends)

    def restore(self, state: LifeState) -> None:
        """Go on where the life in the previous process stood."""
        self.trouble = Trouble.from_state(state.trouble) if state.trouble else None
        self.state, self.cause, self._ends = State[state.state], state.cause, state.ends
        self.failed, self.came_up = state.failed, state.came_up

    def note_all(self) -> None:
        """Tell `kept` all of it. Called when the VM begins to be kept."""
        with self._lock:
            self._note(self.state)
            self._kept.note_next_seq(self.next_seq)

    def note_health(self, *, is_well: bool) -> None:
        """Keep a VM whose pump hangs as lost, since the next process would hang for the same reason."""
        with self._lock:
            if self.state is not State.GONE:
                self._note(self.state if is_well else State.LOST)

    def take_seqs(self, number: int) -> range:
        """Hand out the next seqs. Raises `VmError` if it cannot be used."""
        with self._lock:
            if not self.can_be_used:
                raise VmError(self.why_gone)
            seqs = range(self.next_seq, self.next_seq + number)
            self.next_seq = seqs.stop
            self._kept.note_next_seq(seqs.stop)
        return seqs

    def move(self, to: State) -> bool:
        """Move to another state; returns False, and changes nothing, if that is not a legal move."""
        with self._lock:
            return self._move(to)

    def _move(self, to: State) -> bool:
        """Requires _lock."""
        if to not in MOVES[self.state]:
            return False
        self.state = to
        self.came_up = self.came_up or to is State.UP
        self._note(to)
        return True

    def _note(self, state: State) -> None:
        """Requires _lock."""
        if self.came_up:  # a VM that is lost before that does not keep its id
            self._kept.note_state(state)

    def expect_end(self, more: int = 1) -> None:
        """Add a reason that makes its end no failure; with -1, take one back."""
        with self._lock:
            self._ends += more

    def fail(self, cause: str) -> None:
        """Record an end that no client asked for. The first cause counts."""
        if not self.failed:
            self.trouble = Trouble(cause, time.monotonic())
            self.failed = True

    def lose(self, cause: str) -> bool | None:
        """Move to LOST; returns whether that was expected, or None if its life was over already."""
        with self._lock:
            self.cause = self.cause or cause
            expected = self._ends > 0 or self.state is State.LEAVING
            if not self._move(State.LOST):
                return None
            if not expected:
                self.fail(cause)
        return expected

    @property
    def is_gone(self) -> bool:
        """Whether it was up, and was then lost or powered off without a bye."""
        return self.came_up and self.state in (State.LOST, State.GONE)

    @property
    def can_be_used(self) -> bool:
        """Whether it takes commands and sessions."""
        return self.state in (State.UP, State.LEAVING)

    @property
    def why_gone(self) -> str:
        """What to tell a client that wants to use it."""
        return f"VM gone: {self.cause or 'it was unregistered'}"
