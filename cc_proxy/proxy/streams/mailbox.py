"""What other threads have a thread do that waits in epoll."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

#: Seconds for which nothing need be received: poll(2) waits for whole milliseconds.
_MOMENT = 0.002


class Mailbox:
    """Calls for a thread, which it makes in their order once its fd is readable. Owner of that fd."""

    def __init__(self) -> None:
        """Raises `OSError`."""
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._letters: deque[Callable[[], object]] = deque()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def post(self, letter: Callable[[], object]) -> bool:
        """Have the thread call `letter`. False if it is closed. Any thread."""
        with self._lock:
            if self._fd < 0:
                return False
            self._letters.append(letter)
            os.eventfd_write(self._fd, 1)
        return True

    @property
    def empty(self) -> bool:
        """Whether there is nothing that the thread has yet to call. Any thread."""
        return not self._letters

    # The thread whose it is -------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there is something to call."""
        return self._fd

    def receive(self) -> None:
        """Make the calls that `fileno` announces."""
        os.eventfd_read(self._fd)
        self.open()

    def wait(self, seconds: float) -> None:
        """Wait for calls and make them; returns after that, or after the time, give or take a millisecond."""
        if seconds < _MOMENT:
            time.sleep(seconds)
        elif self._poll.poll(int(1000 * seconds)):
            self.receive()

    def open(self) -> None:
        """Make the calls that are there."""
        while self._letters:  # looking and taking are single steps of the interpreter
            self._letters.popleft()()

    def close(self) -> None:
        """Take no more. What is there can still be opened."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1
