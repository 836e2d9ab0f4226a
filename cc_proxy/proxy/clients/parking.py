"""Waiting for clients that say nothing: their threads are woken a few at a time."""

import contextlib
import heapq
import itertools
import math
import os
import queue
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from cc_proxy.log import faults

#: So many threads of a user are woken before this one has to get the interpreter again, as they then have to.
_AT_ONCE = 16
#: Seconds between two looks whether there is still somebody for whom others have to wait.
_LOOK_INTERVAL = 0.25
#: Seconds that the thread gets at the end to finish what it is at.
_LAST_CALL = 1.0


class Idle:
    """Wakes the threads of connections once there is something to read, each user's in turn.

    Threads that wait in recv(2) are all woken by the kernel when thousands of clients go at once, and while
    they fight for the interpreter nobody else gets it, for seconds.
    """

    def __init__(self, alone: Callable[[], bool] = lambda: False) -> None:
        """`alone` says whether nobody has to wait for others now: nothing is put off then."""
        self._alone = alone
        self._users = select.epoll()  # has the epoll instance of each
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._users.register(self._wake, select.EPOLLIN)
        self._stopping = False
        self._asked = False  # the thread has been asked whether it is alive; it takes that back
        # Guards what follows up to _waiting, and that no epoll is closed while it is asked; nothing else is
        # locked while it is held. By uid, and by their fds; of users who have connections.
        self._lock = threading.Lock()
        self._clients: dict[int, select.epoll] = {}
        self._by_fd: dict[int, select.epoll] = {}
        self._connections: Counter[int] = Counter()
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # when, in which order, what; a heap
        self._order = itertools.count()
        # By fd. Each thread adds and removes its own: single steps of the interpreter, which need no lock.
        self._waiting: dict[int, queue.SimpleQueue[None]] = {}
        self._thread = threading.Thread(target=self._wake_all, name="idle", daemon=True)

    def start(self) -> None:
        """Begin to wake. Main thread."""
        self._thread.start()

    def close(self) -> None:
        """Wake those who still wait, and nobody any more. Main thread."""
        self._stopping = True
        if self._thread.ident is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        for waiting in list(self._waiting.values()):
            waiting.put(None)
        with self._lock:  # who is just being dismissed is not among them, then
            epolls = [*self._clients.values(), self._users]
        for epoll in epolls:
            epoll.close()
        os.close(self._wake)

    def answers(self) -> bool:
        """Whether the thread has answered the last call of this, and ask it again. Main thread."""
        if self._asked:
            return False
        self._asked = True
        os.eventfd_write(self._wake, 1)
        return True

    def admit(self, uid: int) -> None:
        """Be ready for one more connection of a user. Raises `OSError`. Any thread."""
        with self._lock:
            if uid not in self._clients:
                epoll = self._registered()
                self._by_fd[epoll.fileno()] = self._clients[uid] = epoll
            self._connections[uid] += 1

    def _registered(self) -> select.epoll:
        epoll = select.epoll()
        try:
            self._users.register(epoll, select.EPOLLIN)
        except BaseException:
            epoll.close()
            raise
        return epoll

    def dismiss(self, uid: int) -> None:
        """A connection that was admitted has gone; nobody waits for it any more. Any thread."""
        with self._lock:
            self._connections[uid] -= 1
            if not self._connections[uid] and not self._stopping:
                del self._connections[uid]
                epoll = self._clients.pop(uid)
                del self._by_fd[epoll.fileno()]
                epoll.close()  # which takes it out of `_users`

    def wait(self, uid: int, sock: socket.socket, timeout: float | None) -> None:
        """Return once a user's socket has something to read or is closed, or after `timeout` seconds.

        After `close`, return at once. Any thread, for a connection that was admitted.
        """
        epoll = self._clients[uid]
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        fd = sock.fileno()
        self._waiting[fd] = woken
        try:
            if self._stopping:
                return
            with contextlib.suppress(queue.Empty, ValueError):  # it is closed in this moment
                epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
                woken.get(timeout=timeout)
        finally:
            del self._waiting[fd]
            with contextlib.suppress(OSError, ValueError):  # it may be closed by now
                epoll.unregister(fd)

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Have a function called by the thread, in so many seconds at the latest. Any thread."""
        later = time.monotonic() + seconds, next(self._order), function
        with self._lock:
            heapq.heappush(self._later, later)
            first = self._later[0] is later
        if first:
            os.eventfd_write(self._wake, 1)

    def call_all(self) -> None:
        """Call now what was to be called later, and return once all of it has been. Main thread."""
        while function := self._next_until(math.inf):
            function()
        # The thread may have taken one out, and be at it.
        done = threading.Event()
        self.call_later(0.0, done.set)
        done.wait(_LAST_CALL)

    def _next_until(self, moment: float) -> Callable[[], None] | None:
        with self._lock:
            due = bool(self._later) and self._later[0][0] <= moment
            return heapq.heappop(self._later)[2] if due else None

    def _until_next(self) -> float | None:
        with self._lock:
            if not self._later:
                return None
            wait = self._later[0][0] - time.monotonic()
        return 0.0 if self._alone() else max(0.0, min(wait, _LOOK_INTERVAL))

    def _wake_all(self) -> None:
        """Wake until the end, whatever happens."""
        while not self._stopping:
            try:
                self._wake_ready()
            except Exception:
                faults.note("waking connections failed")

    def _wake_ready(self) -> None:
        """Wake some of each user's that are ready."""
        for fd, _ in self._users.poll(self._until_next()):
            if fd == self._wake:
                os.eventfd_read(fd)
                self._asked = False
            else:
                self._wake_some(fd)
        for _ in range(_AT_ONCE):
            function = self._next_until(math.inf if self._alone() else time.monotonic())
            if function is None:
                break
            function()

    def _wake_some(self, of_user: int) -> None:
        with self._lock:
            epoll = self._by_fd.get(of_user)  # None if the user has just gone
            ready = epoll.poll(0, _AT_ONCE) if epoll else []
        for fd, _ in ready:
            waiting = self._waiting.get(fd)
            if waiting:
                waiting.put(None)
