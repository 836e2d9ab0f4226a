"""Calls that other threads leave for a thread that waits in epoll."""

import os
import threading
from collections import deque
from collections.abc import Callable


class Mailbox:
    """Calls for one thread, which makes them in order when the mailbox's fd is readable. Owns that fd."""

    def __init__(self) -> None:
        """Raises `OSError`."""
        self._lock = threading.Lock()  # guards _fd, and that no call is added once it is closed; innermost
        self._calls: deque[Callable[[], object]] = deque()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def post(self, call: Callable[[], object]) -> bool:
        """Have the thread call `call`. False if the mailbox is closed. Any thread."""
        with self._lock:
            if self._fd < 0:
                return False
            self._calls.append(call)
            os.eventfd_write(self._fd, 1)
        return True

    def forwarded(self, call: Callable[[bool], None]) -> Callable[[bool], None]:
        """Return a function that any thread may call, and that has the mailbox's thread call `call`."""

        def forward(value: bool) -> None:
            self.post(lambda: call(value))

        return forward

    # The mailbox's thread ---------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there is something to call."""
        return self._fd

    def receive(self) -> None:
        """Make the calls that `fileno` announces."""
        os.eventfd_read(self._fd)
        self.make_calls()

    def make_calls(self) -> None:
        """Make the calls that have been left."""
        while self._calls:  # only this thread takes any out
            self._calls.popleft()()

    def close(self) -> None:
        """Take no more calls. Those that have been left can still be made."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1
