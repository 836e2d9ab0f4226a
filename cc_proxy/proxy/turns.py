"""Turns: one thread at a time, first come, first served."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cc_proxy.proxy.rest import Resting


@dataclass(eq=False, slots=True)
class Waiter:
    """A place in line. `turn` is locked until the turn has come."""

    turn: threading.Lock = field(default_factory=threading.Lock, init=False)
    #: Whether it was put in line for a thread that waits.
    is_in_line: bool = field(default=False, init=False)


AWaiter = TypeVar("AWaiter", bound=Waiter)


class Turns(Generic[AWaiter]):
    """The line of waiters, and whether some thread has the turn. Any thread."""

    def __init__(self, on_idle: Callable[[], None] = lambda: None) -> None:
        """`on_idle` is called by the thread that gives up the turn, when no waiter is in line."""
        self._on_idle = on_idle
        # Guards all that follows. While it is held, `on_idle` may be called, but no thread waits or takes
        # another lock.
        self._lock = threading.Lock()
        self._taken = False
        self._queue: deque[AWaiter] = deque()
        #: Whether threads are to come to rest: none gets the turn any more, or waits for it.
        self.resting = False

    def rest(self) -> None:
        """Have all threads that wait raise `Resting`. Their waiters stay in line."""
        with self._lock:
            if not self.resting:
                self.resting = True
                for waiter in self._queue:
                    if waiter.is_in_line:
                        waiter.turn.release()

    def restore(self, waiters: Iterable[AWaiter]) -> None:
        """Put waiters in line whose threads have yet to call `get`. Call this before anything else."""
        for waiter in waiters:
            self._line_up(waiter)

    def _line_up(self, waiter: AWaiter) -> None:
        """Requires _lock, or that no other thread uses this yet."""
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
        """Put a waiter in line. Returns whether the caller has the turn now, and has to pass it on."""
        with self._lock:
            self._queue.append(waiter)
            return self._take()

    def get(self, waiter: AWaiter, deadline: float) -> bool:
        """Wait for the turn until `deadline` (`time.monotonic`); returns whether it came.

        Raises `Resting`; the waiter stays in line.
        """
        with self._lock:
            if not waiter.is_in_line:  # it is if it was restored
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
        # The turn came at the last moment, and the thread that passes it on may still be sending for it.
        return came or waiter.turn.acquire()

    def next(self) -> AWaiter | None:
        """Return the next waiter; None if the line is empty, and then the turn is free. Requires the turn.

        The caller keeps the turn until it releases the waiter's `turn`, or calls this again instead.
        """
        with self._lock:
            if self._queue and not self.resting:
                return self._queue.popleft()
            self._on_idle()
            self._taken = False
        return None
