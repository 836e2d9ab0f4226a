"""Whose turn it is: one thread at a time, first come, first served."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cc_proxy.proxy.rest import Resting


@dataclass(eq=False, slots=True)
class Waiter:
    """Who waits for a turn. `turn` is locked until it has come."""

    turn: threading.Lock = field(default_factory=threading.Lock, init=False)
    #: Whether a thread waits in line for it, or has.
    is_in_line: bool = field(default=False, init=False)


AWaiter = TypeVar("AWaiter", bound=Waiter)


class Turns(Generic[AWaiter]):
    """Who waits for the turn, and whether some thread has it. Any thread."""

    def __init__(self, on_idle: Callable[[], None] = lambda: None) -> None:
        """`on_idle` is called by the thread that has had the turn, when nobody waits for it."""
        self._on_idle = on_idle
        # Guards all that follows; on_idle is called with it held, nothing else is locked, and nobody waits.
        self._lock = threading.Lock()
        self._taken = False
        self._queue: deque[AWaiter] = deque()
        #: Whether nobody gets a turn any more; nobody waits for one then.
        self.resting = False

    def rest(self) -> None:
        """Have all threads that wait leave, and their waiters stay in line."""
        with self._lock:
            if not self.resting:
                self.resting = True
                for waiter in self._queue:
                    if waiter.is_in_line:
                        waiter.turn.release()

    def restore(self, waiters: Iterable[AWaiter]) -> None:
        """Have waiters in line whose threads have yet to come (`get`). Before anybody else does."""
        for waiter in waiters:
            self._line_up(waiter)

    def _line_up(self, waiter: AWaiter) -> None:
        """Requires _lock, or that nobody else is there."""
        waiter.is_in_line = True
        waiter.turn.acquire()
        self._queue.append(waiter)

    def take(self) -> bool:
        """Take the turn if nobody has it; returns whether it was free. Never waits."""
        with self._lock:
            return self._take()

    def _take(self) -> bool:
        """Requires _lock."""
        if self._taken or self.resting:
            return False
        self._taken = True
        return True

    def join(self, waiter: AWaiter) -> bool:
        """Wait in line. Returns whether the caller has the turn now, to pass it on."""
        with self._lock:
            self._queue.append(waiter)
            return self._take()

    def get(self, waiter: AWaiter, deadline: float) -> bool:
        """Wait for the turn until `deadline` (`time.monotonic`); returns whether it came.

        Raises `Resting`; the waiter stays in line.
        """
        with self._lock:
            if not waiter.is_in_line:  # as it is if it was restored
                if not self._taken and (self.resting or not self._queue):
                    self._taken = True
                    return True
                self._line_up(waiter)
            elif not self._taken:
                self._taken = True
                self._queue.popleft().turn.release()
            if self.resting:
                raise Resting
        came = waiter.turn.acquire(timeout=max(0.0, deadline - time.monotonic()))
        if came and not self.resting:
            return True
        with self._lock:
            if waiter in self._queue:
                if self.resting:
                    raise Resting
                self._queue.remove(waiter)
                return False
        # It came at the last moment, and whoever passes it on may still be at work for the waiter.
        return came or waiter.turn.acquire()

    def next(self) -> AWaiter | None:
        """Return whose turn it is now; after None it is nobody's. Requires the turn.

        The caller keeps it until it releases `turn`. If it gives the turn to nobody, it calls this again.
        """
        with self._lock:
            if self._queue and not self.resting:
                return self._queue.popleft()
            self._on_idle()
            self._taken = False
        return None
