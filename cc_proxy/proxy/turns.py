"""When a VM has its turn, while other users have something to do too, and what it takes in it."""

import math
import time
from collections.abc import Callable

from cc_proxy.proxy.users import CREDIT, Share

#: Seconds that a turn lasts, if there is so much to do.
_LENGTH = 0.000_5
#: A turn costs so many seconds of a CPU more if somebody else is in haste, who meets with it however short
#: it is. An answer costs less, and nothing if the turn before was the same VM's.
_TURN, _ANSWER = 0.006, 0.002
#: An answer has no more frames than this, and so much of the time for it is counted if there is one after the
#: other: who speaks with one VM, and others do likewise, are equals. But root goes first.
_FEW = 4
_AMONG_EQUALS = 0.4
#: Seconds that are rested at once at the most.
_LONGEST_REST = 1.0
#: Seconds that a frame may take the interpreter, whatever it is, and a client that is read or sent something.
#: A system call lets others have it, but a short one is over before they notice.
_FRAME = 0.000_001
_CALL = 0.000_002


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
        self._begins = True
        self._until = -math.inf  # so long the turn lasts that it has now
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
        if time.monotonic() < self._until:
            return False
        rested = False
        while (left := most()) > 0 and (due := self._place.due()) > 0:
            rested = True
            wait(min(left, due))
            self.charge()
        self._until = time.monotonic() + _LENGTH
        self._begins = True
        return rested

    def charge(self, frames: int = 0, calls: int = 0, conversing: bool = False) -> float:
        """Count what was taken of a CPU since the last time; returns for how long at a stretch that was.

        `frames` have passed since then, and `calls` were made to read clients or to send them something;
        `conversing` if these were answers.
        """
        assert self._counted_at is not None, "not while it is alone"
        now = time.thread_time()
        took, self._counted_at = now - self._counted_at, now
        stretch = min(took, frames * _FRAME + calls * _CALL)
        if not frames:
            self._share.spend(took, stretch)
            return stretch
        again, self._share.last_turn = self._share.last_turn is self, self
        answers = conversing and frames <= _FEW
        other = self._share.disturbed
        more = 0.0
        if answers and again:
            stretch = 0.0
            if not (other and other.exempt):
                took *= _AMONG_EQUALS
        elif other and self._begins:
            more = _ANSWER if answers else _TURN
        self._begins = False
        self._share.spend(took, stretch, more)
        return stretch
