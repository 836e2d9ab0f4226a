"""Where a VM is in its life, where it can get from there, and what went wrong."""

import threading
import time
from typing import NamedTuple, Self

from cc_proxy.continuity.cells import State
from cc_proxy.continuity.state.vms import LifeState, TroubleState


class VmError(Exception):
    """Something failed in a VM; the text is the cause, as clients are told it."""


#: Where it can get from each.
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
        """Return what the process before knew."""
        return cls(state.text, time.monotonic() - state.age)

    def state(self) -> TroubleState:
        """Return it as a value, for `from_state`."""
        return TroubleState(self.text, time.monotonic() - self.at)


class Life:
    """One VM's life. Any thread may call, and read what is public; only `trouble` is set from outside."""

    def __init__(self) -> None:
        # Guards what follows against changes by two threads; reading one of them takes no lock. Innermost.
        self._lock = threading.Lock()
        self.state = State.STARTING
        #: Why it was lost; empty if it was not.
        self.cause = ""
        #: Whether something went wrong that ended it, or kept it from coming up.
        self.failed = False
        #: Whether it was ever up.
        self.came_up = False
        #: The last thing that went wrong. Any thread replaces it as a whole.
        self.trouble: Trouble | None = None
        self._ends = 0  # how many reasons there are for it to end that are no failure

    def hand_over(self, state: State) -> LifeState:
        """Return it as a value, for `restore`. It has come as far as `state`."""
        trouble = self.trouble.state() if self.trouble else None
        return LifeState(state.name, self.cause, trouble, self.failed, self.came_up, self._ends)

    def restore(self, state: LifeState) -> None:
        """Go on where the process before stood."""
        self.trouble = Trouble.from_state(state.trouble) if state.trouble else None
        self.state, self.cause, self._ends = State[state.state], state.cause, state.ends
        self.failed, self.came_up = state.failed, state.came_up

    def move(self, to: State) -> bool:
        """Move to another state; returns False, and changes nothing, if that is not a legal move."""
        with self._lock:
            if to not in MOVES[self.state]:
                return False
            self.state = to
            self.came_up = self.came_up or to is State.UP
        return True

    def expect_end(self, more: int = 1) -> None:
        """Its end is no failure from now on, for one reason more; or for one less, with -1."""
        with self._lock:
            self._ends += more

    def fail(self, cause: str) -> None:
        """Record an end that nobody asked for. The first cause counts."""
        if not self.failed:
            self.trouble = Trouble(cause, time.monotonic())
            self.failed = True

    def lose(self, cause: str) -> bool | None:
        """Lose it; returns whether that was expected, or None if it was over already."""
        with self._lock:
            self.cause = self.cause or cause
            expected = self._ends > 0 or self.state is State.LEAVING
            if not expected and State.LOST in MOVES[self.state]:
                self.fail(cause)
        return expected if self.move(State.LOST) else None

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
        """What a client is told that wants to use it."""
        return f"VM gone: {self.cause or 'it was unregistered'}"
