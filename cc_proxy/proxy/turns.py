"""Whose turn it is: one thread at a time, first come, first served."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass(eq=False, slots=True)
class Waiter:
    """Who waits for a turn. `turn` is locked until it has come."""

    turn: threading.Lock = field(default_factory=threading.Lock, init=False)


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

    def take(self) -> bool:
        """Take the turn if nobody has it; returns whether it was free. Never waits."""
        with self._lock:
            was_taken, self._taken = self._taken, True
        return not was_taken

    def join(self, waiter: AWaiter) -> bool:
        """Wait in line. Returns whether the caller has the turn now, to pass it on."""
        with self._lock:
            self._queue.append(waiter)
            was_taken, self._taken = self._taken, True
        return not was_taken

    def get(self, waiter: AWaiter, deadline: float) -> bool:
        """Wait for the turn until `deadline` (`time.monotonic`); returns whether it came."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            waiter.turn.acquire()
            self._queue.append(waiter)
        if waiter.turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return True
        with self._lock:
            if waiter in self._queue:
                self._queue.remove(waiter)
                return False
        # It came at the last moment, and whoever passes it on may still be at work for the waiter.
        return waiter.turn.acquire()

    def next(self) -> AWaiter | None:
        """Return whose turn it is now; after None it is nobody's. Requires the turn.

        The caller keeps it until it releases `turn`. If it gives the turn to nobody, it calls this again.
        """
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._on_idle()
            self._taken = False
        return None
