"""Coming to rest: every thread ends where all that it was at is in a value, for another process to go on."""

import select
import socket
import threading
import time

#: Seconds after which a thread that waits looks whether anybody still wants what it waits for.
LOOK_UP = 0.1


class Resting(Exception):
    """What was to be done is left to the next process, as far as it has come."""


class Rest:
    """Whether threads are to come to rest. Any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def begin(self) -> None:
        """From now on."""
        self._event.set()

    def check(self) -> None:
        """Raise `Resting` if it is time to."""
        if self._event.is_set():
            raise Resting

    def wait_for(self, sock: socket.socket, event: int, deadline: float) -> bool:
        """Wait for an event of poll(2) until `deadline` (`time.monotonic`); returns whether it came.

        Raises `Resting`.
        """
        ready = select.poll()
        ready.register(sock, event)
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            if ready.poll(1_000 * min(left, LOOK_UP)):
                return True
        return False

    def sleep(self, seconds: float) -> float:
        """Sleep so long; returns what is left of it as soon as it is time to come to rest."""
        until = time.monotonic() + seconds
        return max(0.0, until - time.monotonic()) if self._event.wait(seconds) else 0.0
