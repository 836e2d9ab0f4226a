"""The agent's event loop: one thread, one epoll instance, a few timers."""

import contextlib
import heapq
import itertools
import os
import select
import time
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

#: Events to wait for. Hang-ups are always reported, even with `NOTHING_ELSE`.
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR
NOTHING_ELSE = 0
#: Together with others: report again only after something has changed.
ONCE = select.EPOLLET

_WAKE_READ = 4096


class Turn(IntEnum):
    """When in a round an fd is served."""

    COMMANDS = 0
    FRAMES = 1
    PROCESSES = 2
    #: Only in a round in which nothing else is ready.
    LAST = 3


class _Watched(NamedTuple):
    turn: Turn
    callback: Callable[[int], None]


class Loop:
    """Calls back when fds are ready or time is up. Only `stop` may be called by any thread.

    Like the real agent's loop, it goes in rounds: everything ready is served once, in the order of its turns.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, _Watched] = {}
        #: Fds watched since the last wait. That wait's events on these numbers are about files closed since.
        self._new: set[int] = set()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._stopping = False
        #: Called after something has been written to `wakeup_fd`; perhaps once for several signals.
        self.on_wake: Callable[[], None] = lambda: None
        self._wake_reader, self.wakeup_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._wake_reader, READ, self._woken, Turn.COMMANDS)

    # Any thread, and signal handlers -----------------------------------------------------------------

    def stop(self) -> None:
        """Have `run` return. Must not be called after `close`."""
        self._stopping = True
        # If the pipe is full, the loop wakes up without another byte.
        with contextlib.suppress(BlockingIOError):
            os.write(self.wakeup_fd, b"\0")

    # The loop's thread -------------------------------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], None], turn: Turn) -> None:
        """Call `callback` with the events that are ready, again and again. Replaces what `fd` had before."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
            self._new.add(fd)
        self._watched[fd] = _Watched(turn, callback)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; call this before it is closed. Does nothing if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` once, after this many seconds."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), callback))

    def run(self) -> None:
        """Call back until `stop` is called. What a callback raises ends it, and is raised from here."""
        while not self._stopping:
            timeout = self._run_timers()
            self._new.clear()
            self._serve(self._epoll.poll(timeout))

    def close(self) -> None:
        """Close the loop's own fds."""
        self._epoll.close()
        os.close(self._wake_reader)
        os.close(self.wakeup_fd)

    def _serve(self, ready: list[tuple[int, int]]) -> None:
        ready.sort(key=lambda item: self._watched[item[0]].turn)
        nothing_else = bool(ready) and self._watched[ready[0][0]].turn is Turn.LAST
        for fd, events in ready:
            watched = self._watched.get(fd)
            if watched is None or fd in self._new:
                continue
            if nothing_else or watched.turn is not Turn.LAST:
                watched.callback(events)

    def _run_timers(self) -> float | None:
        """Call what is due; returns the seconds until the next timer; None if there is none."""
        while self._timers:
            left = self._timers[0][0] - time.monotonic()
            if left > 0:
                return left
            heapq.heappop(self._timers)[2]()
        return None

    def _woken(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, _WAKE_READ)
        self.on_wake()
