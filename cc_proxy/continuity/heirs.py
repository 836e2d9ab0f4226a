"""Who goes on with what this process hands over: a process that the manager starts, or one started here."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Protocol, Self

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import TimedOut
from cc_proxy.continuity.box import Box
from cc_proxy.linux.systemd import Notifier, take_stored

#: <sysexits.h>; the unit has it mean that another process is to be started.
EX_TEMPFAIL = 75
#: How the names begin under which any version has the service manager store fds, and that of the box's ends.
_OURS = "cc-proxy-"
_STORED_AS = f"{_OURS}box"
#: Names the process that has started this one, and the fds that it has passed.
_PREDECESSOR = "CC_PROXY_PREDECESSOR"
#: Seconds that a process which was started gets to be ready, and to take over: nobody is served meanwhile.
_PATIENCE, _PAUSE = 30.0, 5.0
_STATE = "cc-proxy-state"
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

    def hand_over(self, data: bytes, fds: Sequence[int]) -> None:
        """Give everything away; this process is to touch it no more. Raises `NotReplaced`: then it may."""

    def close(self) -> None:
        """It has been handed over, or not."""


def put_in(box: Box, data: bytes, fds: Sequence[int]) -> None:
    """Put a state and its fds into an empty box. Raises `NotReplaced`, and some may be in it."""
    try:
        with open(os.memfd_create(_STATE), "wb", buffering=0) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            box.fill([file.fileno(), *fds])
    except OSError as error:
        raise NotReplaced(f"the fds cannot be handed over: {error.strerror}") from None


def look_into(box: Box) -> tuple[bytes, list[int]]:
    """Return the state and the fds in a box, which stay there. Raises `OSError`."""
    memory, *fds = box.look()
    try:
        return os.pread(memory, os.fstat(memory).st_size, 0), fds
    finally:
        os.close(memory)


class Store:
    """The service manager: it keeps the box, and starts another process when this one has ended."""

    exit_status = EX_TEMPFAIL

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self.box: Box | None = None
        #: Why what was left here is lost; empty if it is not.
        self.lost = ""
        for name, fds in take_stored(_OURS).items():
            if name == _STORED_AS and len(fds) == 2:  # noqa: PLR2004 - its ends
                self.box = Box([socket.socket(fileno=fd) for fd in fds])
            else:  # another version's, or half a box
                self._forget(name)
                for fd in fds:
                    os.close(fd)
                if name == _STORED_AS:
                    self.lost = "the service manager has dropped a part of it"
        #: Why there is none.
        self.error = ""

    def open(self) -> None:
        """Have an empty box kept. If the manager keeps none, `error` says so."""
        if self.box is None:
            try:
                self.error = self._make_box()
            except OSError as error:
                self.error = str(error)
        if self.box:
            self.box.leave_to_keeper()
            if not self.error and not self.box.is_kept:
                self.error = "it keeps no fds: set FileDescriptorStoreMax= to 2 at least"
        if self.error:
            self._forget(_STORED_AS)  # it may keep one end

    def _make_box(self) -> str:
        """Returns why the manager does not keep it. Raises `OSError`."""
        self.box = Box()
        if self._notifier.store(_STORED_AS, [end.fileno() for end in self.box.ends]):
            return ""
        return self._notifier.error or "it does not answer"

    def _forget(self, name: str) -> None:
        self._notifier.tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def prepare(self) -> None:
        """See whether the box is kept. Raises `NotReplaced`."""
        if self.error or not self.box or not self.box.is_kept:
            raise NotReplaced(f"the service manager keeps nothing: {self.error or 'it has dropped the box'}")

    def hand_over(self, data: bytes, fds: Sequence[int]) -> None:
        """Put everything into the box. Raises `NotReplaced`."""
        assert self.box
        try:
            put_in(self.box, data, fds)
            self.prepare()
        except NotReplaced:
            # There may be something in it that nobody is to find.
            self._forget(_STORED_AS)
            self.box.close()
            self.box = None
            raise

    def close(self) -> None:
        """Close this process's ends; the manager keeps its own."""
        if self.box:
            self.box.close()


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

    def hand_over(self, data: bytes, fds: Sequence[int]) -> None:
        """Give everything to it, and wait until it has taken over. Raises `NotReplaced`."""
        assert self._box
        assert self._link
        put_in(self._box, data, fds)
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
