"""Where a VM is in its life, where it can get from there, and what went wrong."""

import time
from enum import Enum, auto
from typing import NamedTuple, Self

from cc_proxy.proxy.vms.state import TroubleState


class State(Enum):
    """Where a VM is in its life."""

    STARTING = auto()  # hello has begun
    UP = auto()
    LEAVING = auto()  # bye was said: its clients may stay until the linger is over
    LOST = auto()  # what it has sent is still delivered
    GONE = auto()


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
