"""When a VM has its turn, while other users have something to do too, and what it takes in it."""

import time
from collections.abc import Callable

from cc_proxy.proxy.shares import CREDIT, Share

#: Seconds that are rested at once at the most.
_LONGEST_REST = 1.0
#: Seconds that a frame may take the interpreter, whatever it is; a system call lets others have it.
_FRAME = 0.000_001


class Place:
    """Where somebody who works for a VM stands in the line of its user's VMs. One thread at a time."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._at: float | None = None

    def due(self) -> float:
        """Return for how many seconds to wait, and ask again then; 0 if it may have its turn now.

        With the first question it is in the line, and with a 0 out of it again.
        """
        if self._share.contended:
            if self._at is None:
                self._at = self._share.book()
            left = self._at - time.monotonic()
            if left > CREDIT:
                return min(left, _LONGEST_REST)
        self._at = None
        return 0.0


class Turns:
    """Those of one pump, in its thread."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._place = Place(share)
        self._counted_at: float | None = None  # time.thread_time's, when what it took was counted last

    def alone(self) -> bool:
        """Whether there is nobody to take turns with. What it takes counts from the first time there is."""
        if not self._share.others:
            self._counted_at = None
            return True
        if self._counted_at is None:
            self._counted_at = time.thread_time()
        return False

    def rest(self, wait: Callable[[float], None], most: Callable[[], float]) -> bool:
        """Have `wait` do only what has to be done until the next turn; returns whether there was a wait.

        `most` says for how many seconds it may wait from now on.
        """
        rested = False
        while (left := most()) > 0 and (due := self._place.due()) > 0:
            rested = True
            wait(min(left, due))
            self.charge()
        return rested

    def charge(self, frames: int = 0) -> float:
        """Count what was taken of a CPU since the last time; returns for how long at a stretch that was."""
        assert self._counted_at is not None, "not while it is alone"
        now = time.thread_time()
        took, self._counted_at = now - self._counted_at, now
        stretch = min(took, frames * _FRAME)
        self._share.spend(took, stretch)
        return stretch
