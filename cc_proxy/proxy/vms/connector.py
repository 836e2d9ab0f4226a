"""The connector: processes that connect to VMs' sockets with the rights of the daemon's clients.

No thread of the daemon ever takes on a client's uid. The kernel lets users change the scheduling of every
task that has their uid, and a thread that a user slowed down like this would slow down all others through the
GIL. So the daemon forks the connector before it has threads, and the connector forks a child for each hello.
The child takes on the client's rights and connects sockets that the daemon has made and still owns; it only
reports how that went. A path that hangs, on whatever file system, hangs that child alone.

A child ends when it has done its work or the daemon hangs up on it. In the second case the kernel sends it a
signal, which ends it unless it waits for a file system that never answers. The daemon limits how many such
children each user has.
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
from cc_proxy.proxy.vms.connector_process import MOST_BYTES, REPORT, DialRequest, run_connector

#: The most children of one user that may hang at once. Each takes about a megabyte.
_MOST_LEFT = 32
#: Seconds to wait for the end of a child after hanging up on it.
_PATIENCE = 0.2


class Report(NamedTuple):
    """How the latest try to connect a socket went."""

    number: int
    errno: int


class TooManyHang(Exception):
    """Too many earlier attempts of a user still hang; the text has their number."""


class Attempt:
    """The daemon's end of one child. One thread."""

    def __init__(self, uid: int, reports: socket.socket) -> None:
        self.uid = uid
        self._reports = reports

    def next_report(self, deadline: Deadline) -> Report | None:
        """Return the child's next report, or None once it has ended. Raises `TimedOut`."""
        deadline.wait_readable(self._reports, "a connector")
        try:
            report = self._reports.recv(REPORT.size)
        except ConnectionError:
            return None
        return Report(*REPORT.unpack(report)) if report else None

    def hang_up(self) -> None:
        """Have the kernel end the child."""
        with contextlib.suppress(OSError):
            self._reports.shutdown(socket.SHUT_WR)

    def reap(self, patience: float = 0.0) -> bool:
        """Wait up to `patience` seconds for the child's end; returns whether it has ended.

        If so, our end is closed.
        """
        deadline = Deadline(patience)
        try:
            while self.next_report(deadline):
                pass
        except TimedOut:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Close our end. The child ends if it can."""
        self._reports.close()


class Connector:
    """The daemon's handle of the connector. Any thread.

    The process does not end by itself. If something has killed it, it is started again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all that follows; innermost
        self._control: socket.socket | None = None
        self._pid = 0
        self._left: list[Attempt] = []  # attempts whose child was still there after hanging up

    def start(self) -> None:
        """Start the process. Call this before there are other threads. Raises `OSError`."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process, and those of its children that can be ended."""
        with self._lock:
            self._end()
            while self._left:
                self._left.pop().close()

    @contextlib.contextmanager
    def connecting(
        self, who: Credentials, targets: Sequence[tuple[socket.socket, bytes]], deadline: Deadline
    ) -> Iterator[Attempt]:
        """Connect sockets to paths with the rights of `who`, one after the other; yields the attempt.

        A blocking socket is tried again while nobody listens there. Raises `TooManyHang`, `TimedOut` or
        `OSError`. Leaving the context ends the attempt.
        """
        self._admit(who.uid)
        request = DialRequest(who.uid, who.gid, who.groups, [path for _, path in targets])
        ours, theirs = socket.socketpair()
        attempt = Attempt(who.uid, ours)
        try:
            with theirs:
                fds = [theirs.fileno(), *(sock.fileno() for sock, _ in targets)]
                self._ask(msgspec.msgpack.encode(request), fds, deadline)
            yield attempt
        finally:
            attempt.hang_up()
            if not attempt.reap(_PATIENCE):
                with self._lock:
                    self._left.append(attempt)

    def _admit(self, uid: int) -> None:
        with self._lock:
            self._left = [attempt for attempt in self._left if not attempt.reap()]
            hanging = sum(attempt.uid == uid for attempt in self._left)
        if hanging >= _MOST_LEFT:
            raise TooManyHang(f"{hanging} earlier attempts of user {uid} still hang in the kernel")

    def _ask(self, request: bytes, fds: list[int], deadline: Deadline) -> None:
        """Pass a request and its fds to the process. Raises `TimedOut` or `OSError`."""
        while True:
            with self._lock:  # so that no other thread closes it meanwhile
                with contextlib.suppress(BlockingIOError):
                    return self._send(request, fds)
                control = self._running()
            deadline.wait_writable(control, "the connector")

    def _send(self, request: bytes, fds: list[int]) -> None:
        """Pass them to the process, or to a new one if it has been killed. Requires _lock."""
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            socket.send_fds(self._running(), [request], fds, flags)
        except ConnectionError:
            self._end()
            socket.send_fds(self._running(), [request], fds, flags)

    def _running(self) -> socket.socket:
        """Return the socket of the process; start it first if necessary. Requires _lock."""
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                # A request goes in whole or not at all, and the default has no room for 65,536 groups.
                self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
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
        """End the process, if there is one. Requires _lock."""
        if self._control is not None:
            self._control.close()
            self._control = None
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)  # it has nothing to lose
                os.waitpid(self._pid, 0)
