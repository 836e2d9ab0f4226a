"""The connector: processes beside the daemon's that connect to VMs' sockets with their clients' rights.

The kernel lets a user change the scheduling of every task that has its uid. A thread of the daemon's needs
the GIL, so one with a client's uid could be made to hold up all the others: no thread of the daemon's ever
has one. The connector is a process that is forked off before there are threads, and it forks a child for each
hello. That takes on the client's rights and connects sockets that the daemon has made and owns; nothing is
passed back but how that went. A path that hangs, whatever file system it is on, hangs that child alone.

A child lives until it has done its work or the daemon hangs up on it. Then the kernel sends it a signal, and
it ends unless it waits for a file system that never answers. Such children are counted for each user.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import TimedOut
from cc_proxy.linux.credentials import Credentials
from cc_proxy.proxy.vms.connector_process import LENGTH, REPORT, Request, run_connector

#: Children of one user's that may be left hanging, each of which takes about a megabyte.
_MOST_LEFT = 32
#: Seconds that a child gets to end once it is of no use any more; if it has not, it is left.
_PATIENCE = 0.2


class Target(NamedTuple):
    """A socket that is to be connected, and to which path."""

    sock: socket.socket
    path: bytes
    #: Whether to look again while nobody listens there.
    patient: bool


class Report(NamedTuple):
    """How the latest look for a socket went."""

    number: int
    errno: int


class TooManyHang(Exception):
    """Too many earlier attempts of a user still hang; the text says how many."""


class Attempt:
    """The daemon's end of one child. One thread."""

    def __init__(self, uid: int, reports: socket.socket) -> None:
        self.uid = uid
        self._reports = reports

    def ask(self, request: bytes, deadline: Deadline) -> None:
        """Tell the child what to do. Raises `TimedOut`."""
        left = memoryview(LENGTH.pack(len(request)) + request)
        while left:
            try:
                left = left[self._reports.send(left, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                deadline.wait_writable(self._reports, "a connector")
            except ConnectionError:
                return  # it has ended; perhaps it has said why

    def next_report(self, deadline: Deadline) -> Report | None:
        """Return what the child reports next, None once it has ended. Raises `TimedOut`."""
        deadline.wait_readable(self._reports, "a connector")
        try:
            report = self._reports.recv(REPORT.size)
        except ConnectionError:
            return None
        return Report(*REPORT.unpack(report)) if report else None

    def hang_up(self) -> None:
        """End the child."""
        with contextlib.suppress(OSError):
            self._reports.shutdown(socket.SHUT_WR)

    def has_ended(self, patience: float = 0.0) -> bool:
        """Whether the child is no more, or so within `patience` seconds; then its end here is closed."""
        deadline = Deadline(patience)
        try:
            while self.next_report(deadline):
                pass
        except TimedOut:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Hang up on the child, and forget it."""
        self._reports.close()


class Connector:
    """The daemon's handle of the connector. Any thread.

    The process is started again if it has ended, which it does not by itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all that follows; innermost
        self._control: socket.socket | None = None
        self._pid = 0
        self._left: list[Attempt] = []  # hung up on, and not ended yet when last looked at

    def start(self) -> None:
        """Start the process, if possible before there are threads. Raises `OSError`."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process, and all its children that can be ended."""
        with self._lock:
            self._end()
            while self._left:
                self._left.pop().close()

    @contextlib.contextmanager
    def connecting(
        self, who: Credentials, targets: Sequence[Target], deadline: Deadline
    ) -> Iterator[Attempt]:
        """Connect sockets with the rights of `who`, one after the other; yields what reports of that.

        Raises `TooManyHang`, `TimedOut` or `OSError`. On the way out what still goes on is ended.
        """
        self._admit(who.uid)
        request = Request(who.uid, who.gid, who.groups, [(target.path, target.patient) for target in targets])
        ours, theirs = socket.socketpair()
        attempt = Attempt(who.uid, ours)
        try:
            with theirs:
                self._hand_over([theirs, *(target.sock for target in targets)], deadline)
            attempt.ask(msgspec.msgpack.encode(request), deadline)
            yield attempt
        finally:
            attempt.hang_up()
            if not attempt.has_ended(_PATIENCE):
                with self._lock:
                    self._left.append(attempt)

    def _admit(self, uid: int) -> None:
        with self._lock:
            self._left = [attempt for attempt in self._left if not attempt.has_ended()]
            hanging = sum(attempt.uid == uid for attempt in self._left)
        if hanging >= _MOST_LEFT:
            raise TooManyHang(f"{hanging} earlier attempts of user {uid} still hang in the kernel")

    def _hand_over(self, sockets: list[socket.socket], deadline: Deadline) -> None:
        """Have the process fork a child that gets these sockets. Raises `TimedOut` or `OSError`."""
        fds = [sock.fileno() for sock in sockets]
        while True:
            with self._lock:  # nobody closes it meanwhile
                with contextlib.suppress(BlockingIOError):
                    return self._send(fds)
                control = self._running()
            deadline.wait_writable(control, "the connector")

    def _send(self, fds: list[int]) -> None:
        """Requires _lock."""
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            socket.send_fds(self._running(), [b"c"], fds, flags)
        except ConnectionError:
            self._end()
            socket.send_fds(self._running(), [b"c"], fds, flags)

    def _running(self) -> socket.socket:
        """Return the socket of the process, which is started if there is none. Requires _lock."""
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                self._pid = os.fork()
            except BaseException:
                theirs.close()
                self._control.close()
                self._control = None
                raise
            if not self._pid:
                run_connector(theirs)
            theirs.close()
        return self._control

    def _end(self) -> None:
        """Requires _lock."""
        if self._control is not None:
            self._control.close()
            self._control = None
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)  # it has nothing to lose
                os.waitpid(self._pid, 0)
