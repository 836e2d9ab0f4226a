"""Where connections wait for their clients' next requests. One thread watches all of them."""

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from cc_proxy.log import faults
from cc_proxy.proxy.spin import Spin


class Parked(Protocol):
    """What can be parked. Meanwhile only the parking thread touches it."""

    def fileno(self) -> int:
        """The fd to watch."""

    def on_readable(self) -> bool:
        """Do what can be done at once; returns whether to stay parked. Must not raise or block."""


P = TypeVar("P", bound=Parked)


class Parking(Generic[P]):
    """An epoll instance, and the thread that waits on it, for connections without a thread of their own.

    If each connection had a thread in recv(2), thousands of clients that leave at once would wake thousands
    of threads, and no other thread would get the GIL for a while. And a thread takes ten times the memory of
    a connection.
    """

    def __init__(self, on_leave: Callable[[P], None]) -> None:
        """`on_leave` is called with each connection that leaves. It must not raise or block."""
        self._on_leave = on_leave
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        # By fd. Any thread adds, the parking thread removes: both are atomic under the GIL.
        self._parked: dict[int, P] = {}
        self._calls: deque[Callable[[], None]] = deque()  # any thread appends, the parking thread removes
        self._spin = Spin()
        self._closing = False
        self._probed = False  # the main thread sets it, the parking thread resets it
        self._thread = threading.Thread(target=self._run, name="parking", daemon=True)

    def start(self) -> None:
        """Start the thread. Main thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Connections that are parked, now or later, wait until `close`. Main thread."""
        self._closing = True
        if self._thread.ident is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()

    def close(self) -> None:
        """Stop watching; what is still parked is the caller's again. Main thread."""
        self.stop()
        self._epoll.close()
        os.close(self._wake)

    @property
    def parked(self) -> list[P]:
        """What is parked. Only after `stop`."""
        return list(self._parked.values())

    def park(self, connection: P) -> None:
        """Park a connection. The caller must not touch it after that.

        Raises `OSError` if the kernel watches no more fds. Any thread.
        """
        fd = connection.fileno()
        self._parked[fd] = connection
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except BaseException:
            del self._parked[fd]
            raise

    def call(self, what: Callable[[], None]) -> None:
        """Have the thread call something, which must not block. Any thread."""
        self._calls.append(what)
        os.eventfd_write(self._wake, 1)

    def has(self, connection: P) -> bool:
        """Whether a connection is parked. Parking thread."""
        return self._parked.get(connection.fileno()) is connection

    def probe(self) -> bool:
        """Return whether the thread has answered the last probe; if so, send another. Main thread."""
        if self._probed:
            return False
        self._probed = True
        os.eventfd_write(self._wake, 1)
        return True

    # Parking thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                self._serve_some()
            except Exception:
                faults.note("watching connections failed")

    def _serve_some(self) -> None:
        poll = self._epoll.poll
        for fd, _ in self._spin.wait(lambda: poll(0) or None, poll):
            if fd == self._wake:
                os.eventfd_read(fd)
                self._probed = False
                while self._calls:
                    self._calls.popleft()()
            else:
                self._serve(self._parked[fd])

    def _serve(self, connection: P) -> None:
        if connection.on_readable():
            return
        fd = connection.fileno()
        # Before `on_leave`: the next owner may park it again, or close it, and then its fd may be reused.
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        del self._parked[fd]
        self._on_leave(connection)
