"""A moment by which something must be done, and waiting for a socket until then."""

import errno
import math
import os
import select
import socket
import time

from cc_proxy.api.errors import TimedOut

#: poll(2) takes milliseconds as an int, so a longer wait is several calls.
_LONGEST_WAIT = 86_400.0


class Deadline:
    """The moment `timeout` seconds from now.

    None and infinity mean never; 0 has passed already, so that nothing waits. Every function that takes a
    timeout also takes a deadline, so that several calls can share one.
    """

    def __init__(self, timeout: "float | Deadline | None") -> None:
        if isinstance(timeout, Deadline):
            self._end: float = timeout._end
        else:
            self._end = math.inf if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float:
        """Seconds left, never negative; infinity if there is no end."""
        return max(0.0, self._end - time.monotonic())

    def wait_readable(self, sock: socket.socket, what: str) -> None:
        """Return once `sock` has something to read, or its peer is gone. Raises `TimedOut`, naming `what`."""
        self._wait(sock, select.POLLIN, what)

    def wait_writable(self, sock: socket.socket, what: str) -> None:
        """Return once `sock` takes data, or its peer is gone. Raises `TimedOut`, naming `what`."""
        self._wait(sock, select.POLLOUT, what)

    def _wait(self, sock: socket.socket, events: int, what: str) -> None:
        if sock.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        poll = select.poll()
        poll.register(sock, events)
        while True:
            left = min(self.remaining(), _LONGEST_WAIT)
            # Round up: rounded down, it would poll again and again during the last millisecond.
            if poll.poll(math.ceil(left * 1000)):
                return
            if not self.remaining():
                raise TimedOut(f"timed out waiting for {what}")
