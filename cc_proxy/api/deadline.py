"""A moment by which something has to be through, and waiting for a socket until then."""

import select
import socket
import time

from cc_proxy.api.errors import TimedOut


class Deadline:
    """`timeout` seconds from now; None is never. A timeout of 0 is a timeout, not an absence of one."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds left, 0.0 at the least; None if there is no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def wait_readable(self, sock: socket.socket, what: str) -> None:
        """Return once `sock` has something to read or is closed. Raises `TimedOut` naming `what`."""
        self._wait(sock, select.POLLIN, what)

    def wait_writable(self, sock: socket.socket, what: str) -> None:
        """Return once `sock` can be written to or is closed. Raises `TimedOut` naming `what`."""
        self._wait(sock, select.POLLOUT, what)

    def _wait(self, sock: socket.socket, events: int, what: str) -> None:
        poll = select.poll()
        poll.register(sock, events)
        left = self.remaining()
        # Rounded up, so that the last millisecond is not spent spinning.
        if not poll.poll(None if left is None else int(left * 1000) + (left > 0)):
            raise TimedOut(f"timed out waiting for {what}")
