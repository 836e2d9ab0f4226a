"""Who goes on with what this process hands over: a process that the manager starts, or one started here."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Protocol, Self

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import TimedOut
from cc_proxy.continuity.box import Box
from cc_proxy.linux.fds import Identity

#: Names the process that has started this one, and the fds that it has passed.
_PREDECESSOR = "CC_PROXY_PREDECESSOR"
#: Seconds that a process which was started gets to be ready, and to take over: nobody is served meanwhile.
_PATIENCE, _PAUSE = 30.0, 5.0
#: The process whose end ends all others of its PID namespace.
_INIT = 1
#: Signals that may have come too late for this process.
_PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

#: What the two processes tell each other: that one is ready to take over, that all is in the box, and that it
#: has taken over.
_READY, _FILLED, _TAKEN = b"r", b"f", b"t"


class NotReplaced(Exception):
    """Nobody goes on with it: this process has to; the text says why."""


class Heir(Protocol):
    """Whoever goes on with what this process hands over. Main thread."""

    #: What this process has to exit with for that.
    exit_status: int

    def prepare(self) -> None:
        """See to it that there is one. Raises `NotReplaced`."""

    def hand_over(self, data: bytes, fds: Mapping[int, Identity]) -> None:
        """Give everything away; this process is to touch it no more. Raises `NotReplaced`: then it may."""

    def close(self) -> None:
        """It has been handed over, or not."""


class Successor:
    """A process that is started here, with this one's command line."""

    exit_status = 0

    def __init__(self, directory: str) -> None:
        """`directory` is where this process was started."""
        self._directory = directory
        self._box: Box | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def prepare(self) -> None:
        """Start it, and wait until it has read its settings. Raises `NotReplaced`."""
        if os.getpid() == _INIT:
            self._give_up("it is process 1, and all others of its PID namespace would end with it")
        try:
            self._start()
        except OSError as error:
            self._give_up(f"it cannot be started: {error}")
        self._wait_for(_READY, _PATIENCE)

    def _start(self) -> None:
        """Raises `OSError`."""
        self._box = Box()
        self._link, theirs = socket.socketpair()
        with theirs:
            fds = [*(end.fileno() for end in self._box.ends), theirs.fileno()]
            self._process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                cwd=self._directory,
                env={**os.environ, _PREDECESSOR: ":".join(map(str, [os.getpid(), *fds]))},
                pass_fds=fds,
            )

    def hand_over(self, data: bytes, fds: Mapping[int, Identity]) -> None:
        """Give everything to it, and wait until it has taken over. Raises `NotReplaced`."""
        assert self._box
        assert self._link
        try:
            self._box.put_state(data, fds)
        except OSError as error:
            self._give_up(f"the fds cannot be handed over: {error.strerror}")
        with contextlib.suppress(OSError):
            self._link.send(_FILLED)
        self._wait_for(_TAKEN, _PAUSE)
        assert self._process
        self._process.returncode = 0  # it is on its own now, and this process does not wait for its end
        for number in signal.sigpending() & _PASSED_ON:
            os.kill(self._process.pid, number)

    def close(self) -> None:
        """Close what belongs to this process, and end the other one if it has not taken over."""
        if self._process and self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        if self._link:
            self._link.close()
        if self._box:
            self._box.close()

    def _wait_for(self, word: bytes, seconds: float) -> None:
        assert self._link
        try:
            Deadline(seconds).wait_readable(self._link, "the new process")
            said = self._link.recv(1)
        except (OSError, TimedOut) as error:
            self._give_up(str(error))
        if said != word:
            self._give_up("the new process has ended; its log says why")

    def _give_up(self, why: str) -> None:
        self.close()
        raise NotReplaced(why)


class Predecessor:
    """The process that has started this one, to go on with what it did. Main thread."""

    def __init__(self, box: Box, link: socket.socket) -> None:
        self.box = box
        self._link = link

    @classmethod
    def find(cls) -> Self | None:
        """Return it if there is one, and remove it from the environment."""
        pid, *fds = os.environ.pop(_PREDECESSOR, "").split(":")
        if pid != str(os.getppid()):
            return None
        first, second, link = (socket.socket(fileno=int(fd)) for fd in fds)
        for sock in (first, second, link):
            sock.set_inheritable(False)
        return cls(Box([first, second]), link)

    def wait(self) -> bool:
        """Say that this process is ready, and wait until all is in the box; returns whether it is."""
        self._link.send(_READY)
        return self._link.recv(1) == _FILLED

    def take_over(self) -> None:
        """Say that this process goes on. Raises `OSError` if nobody hears it."""
        self._link.send(_TAKEN, socket.MSG_NOSIGNAL)
        self._link.close()
        self.box.close()
