"""Coming to rest: every thread ends where its work can be handed over, for another process to go on."""

import select
import socket
import threading
import time

#: Seconds between two checks of a waiting thread whether to go on waiting.
LOOK_UP = 0.1


class Resting(Exception):
    """The work so far is in its objects, and the next process goes on with it."""


class Rest:
    """Whether threads are to come to rest. Any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def begin(self) -> None:
        """Have threads come to rest from now on."""
        self._event.set()

    def check(self) -> None:
        """Raise `Resting` if threads are to come to rest."""
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
        """Sleep; returns the seconds that are left if it is time to come to rest, or else 0."""
        until = time.monotonic() + seconds
        return max(0.0, until - time.monotonic()) if self._event.wait(seconds) else 0.0
