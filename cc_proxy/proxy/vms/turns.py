"""Whose turn it is to use the control channel: one thread at a time, first come, first served."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import Command, OnAnswer, ignore


@dataclass(eq=False, slots=True)
class Request:
    """A command that waits for its turn, for its answer, or for both."""

    code: Code
    payload: bytes
    begun: float
    on_answer: OnAnswer = ignore
    #: Called if it cannot be sent. If there is no such call, some thread waits for the request.
    on_refusal: Callable[[], None] | None = None
    #: Locked until the turn is this request's.
    turn: threading.Lock = field(default_factory=threading.Lock)
    #: What was sent; None if that is still to be done.
    command: Command | None = None


class Turns:
    """The requests that wait for the turn, and whether some thread has it. Any thread."""

    def __init__(self, on_idle: Callable[[], None]) -> None:
        """`on_idle` is called by the thread that has had the turn, when nobody waits for it."""
        self._on_idle = on_idle
        # Guards all that follows; on_idle is called with it held, nothing else is locked, and nobody waits.
        self._lock = threading.Lock()
        self._taken = False
        self._queue: deque[Request] = deque()

    def take(self) -> bool:
        """Take the turn if nobody has it; returns whether it was free. Never waits."""
        with self._lock:
            was_taken, self._taken = self._taken, True
        return not was_taken

    def join(self, request: Request) -> bool:
        """Have a request wait in line. Returns whether the caller has the turn now, to pass it on."""
        with self._lock:
            self._queue.append(request)
            was_taken, self._taken = self._taken, True
        return not was_taken

    def get(self, request: Request, deadline: float) -> bool:
        """Wait for the turn until `deadline` (`time.monotonic`); returns whether it came."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            request.turn.acquire()
            self._queue.append(request)
        if request.turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return True
        with self._lock:
            if request in self._queue:
                self._queue.remove(request)
                return False
        return True  # it came at the last moment

    def next(self) -> Request | None:
        """Return whose turn it is now; after None it is nobody's. Requires the turn."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._on_idle()
            self._taken = False
        return None
