"""The process that goes on after this one: the service manager starts it, or this process does."""

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

#: The environment variable with the pid of the process that started this one, and the fds that it passed.
_PREDECESSOR = "CC_PROXY_PREDECESSOR"
#: Seconds that the new process gets to be ready, and then to take over. During the second, no client is
#: served.
_PATIENCE, _PAUSE = 30.0, 5.0
#: The process whose end ends all others of its PID namespace.
_INIT = 1
#: Signals that may come too late for this process, and are passed on to the new one.
_PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

#: What the two processes tell each other: the new one is ready; all is in the box; the new one has taken
#: over.
_READY, _FILLED, _TAKEN = b"r", b"f", b"t"


class NotReplaced(Exception):
    """No other process goes on, so this one has to; the text says why."""


class Heir(Protocol):
    """What goes on with everything that this process hands over. Main thread."""

    #: The status with which this process has to exit for that.
    exit_status: int

    def prepare(self) -> None:
        """Make sure that another process will go on. Raises `NotReplaced`."""

    def hand_over(self, data: bytes, fds: Mapping[int, Identity]) -> None:
        """Give everything away. This process must not touch it any more, unless `NotReplaced` is raised."""

    def close(self) -> None:
        """Close what is open for this, after `hand_over`, whether that succeeded or not."""


class Successor:
    """A process that this one starts, with the same command line."""

    exit_status = 0

    def __init__(self, directory: str) -> None:
        """`directory` is where this process was started."""
        self._directory = directory
        self._box: Box | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def prepare(self) -> None:
        """Start the process, and wait until it has read its settings. Raises `NotReplaced`."""
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
        self._process.returncode = 0  # it is on its own now: `Popen` must not wait for its end
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
    """The process that started this one, in order to be replaced. Main thread."""

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
        """Say that this process goes on. Raises `OSError` if the other one does not hear it."""
        self._link.send(_TAKEN, socket.MSG_NOSIGNAL)
        self._link.close()
        self.box.close()
