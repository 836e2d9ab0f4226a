"""Connecting to what a client's hello names: as that client, and never to the daemon itself."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import TimedOut
from cc_proxy.api.payloads import Hello
from cc_proxy.linux.credentials import CannotAct, Credentials
from cc_proxy.linux.fds import refuse_rights
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH
from cc_proxy.proxy.vms.connector import Attempt, Connector, Report, Target, TooManyHang
from cc_proxy.proxy.vms.connector_process import NOT_ALLOWED, NOT_STARTED

#: Seconds that a console gets once the channels are connected.
_CONSOLE_TIMEOUT = 0.25
#: Which of the sockets are channels: the third is the console.
_CHANNELS = 0, 1
#: Seconds between two questions whether anybody still waits for the sockets.
_INTERVAL = 0.1

_TOO_LATE = "not accepted in time"

#: What a socket is connected to, whatever path led there: the name it was bound to, and the process that
#: made it listen.
Peer = tuple[str, int]


class CannotConnect(Exception):
    """A socket that cannot be connected to; the text names the member of hello, and says why."""


@dataclass(slots=True)
class Connected:
    """The sockets of a VM, and their owner: a context manager that closes them. One thread."""

    ctl: socket.socket
    io: socket.socket
    #: None if there is none, or it could not be connected to, which `console_error` says.
    console: socket.socket | None = None
    console_error: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.ctl, self.io, self.console):
            if sock:
                sock.close()


class Dialer:
    """Connects on behalf of one client. Any thread.

    The kernel judges each step of a path, and the socket at its end, as it would for the client itself, and
    it does so while it connects: an earlier check could be out of date by then. The listener sees the
    client's uid and gid.
    """

    def __init__(
        self,
        client: Credentials,
        connector: Connector,
        own_address: str | bytes | None = None,
        is_here: Callable[[], bool] = lambda: True,
        claim: Callable[[Peer], str] = lambda _: "",
    ) -> None:
        """`own_address` is the name that the daemon's listening socket was bound to.

        `is_here` returns whether the client still waits. `claim` is told what a channel is connected to, and
        returns why it is not to be had, or nothing.
        """
        self._is_here = is_here
        self._claim = claim
        self.client = client
        self._connector = connector
        self._own_address = own_address

    def connect(
        self,
        hello: Hello,
        timeout: float | Deadline,
        *,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> Connected:
        """Connect to the channels that a hello names, and to its console if it has one, within `timeout`
        seconds.

        A channel that is not there yet is looked for again, and one that does not accept is waited for, as
        long as `still_wanted` returns true. The console has to be there, and to accept, at once; a VM can do
        without it. Raises `CannotConnect`, or `RuntimeError` if no process can be had; nothing is left open
        then.
        """
        with contextlib.ExitStack() as undo:
            ctl = undo.enter_context(_Socket("ctlSerial", hello.ctl_serial))
            io = undo.enter_context(_Socket("ioSerial", hello.io_serial))
            connected = Connected(ctl.sock, io.sock)
            extra = None
            if hello.console:
                try:
                    extra = undo.enter_context(_Socket("console", hello.console, blocking=False))
                except CannotConnect as error:
                    connected.console_error = str(error)
            self._dial(
                [ctl, io, extra] if extra else [ctl, io],
                Deadline(timeout),
                lambda: still_wanted() and self._is_here(),
            )
            for channel in (ctl, io):
                if not channel.is_connected:
                    raise channel.error()
            undo.pop_all()
        if extra and extra.is_connected:
            connected.console = extra.sock
        elif extra:
            connected.console_error = str(extra.error())
            extra.sock.close()
        return connected

    def _dial(
        self, sockets: Sequence["_Socket"], deadline: Deadline, still_wanted: Callable[[], bool]
    ) -> None:
        """Connect sockets in this order; says to each how it went. Raises as `connect` does."""
        first, *_ = sockets
        targets = [Target(each.sock, each.path, patient=each.sock.getblocking()) for each in sockets]
        try:
            with self._connector.connecting(self.client, targets, deadline) as attempt:
                while report := _next_report(attempt, deadline, still_wanted):
                    if not self._take_in(report, sockets):
                        return
                    if all(sockets[channel].is_connected for channel in _CHANNELS):
                        deadline = Deadline(min(_CONSOLE_TIMEOUT, deadline.remaining()))
        except TimedOut:
            return
        except _NotWanted:
            first.cause = f"{first.cause or _TOO_LATE}, and nobody waits for it any more"
        except TooManyHang as error:
            first.cause = str(error)
        except OSError as error:
            first.cause = error.strerror or str(error)
        else:
            for each in sockets:
                each.cause = each.cause or "the process that was to connect has been killed"

    def _take_in(self, report: Report, sockets: Sequence["_Socket"]) -> bool:
        """Say to a socket how its last look went; returns whether others may be connected."""
        if report.number == NOT_STARTED:
            raise RuntimeError(f"no process to connect from: {os.strerror(report.errno)}")
        if report.number == NOT_ALLOWED:
            raise CannotConnect(f"{sockets[0].member}: {CannotAct(self.client.uid, report.errno)}")
        sock = sockets[report.number]
        if report.errno == errno.EAGAIN:
            sock.cause = _TOO_LATE
        elif report.errno == errno.ENOTSOCK:
            sock.cause = "it is not a socket"
        elif report.errno:
            sock.cause = os.strerror(report.errno)
        elif cause := self._why_not(sock.sock, is_channel=report.number in _CHANNELS):
            sock.cause = cause
            return False
        else:
            sock.is_connected = True
        return True

    def _why_not(self, sock: socket.socket, *, is_channel: bool) -> str:
        """Say why what a socket was connected to is not to be used; nothing if it may be."""
        # Whatever links and mounts led there, this is the name it was bound to.
        name = sock.getpeername()
        if self._own_address is not None and name == self._own_address:
            return "that is the daemon itself"
        return self._claim((name, Credentials.of_peer(sock).pid)) if is_channel else ""


class _NotWanted(Exception):
    pass


class _Socket:
    """A socket that a hello names, and its owner: a context manager that closes it."""

    def __init__(self, member: str, path: str, *, blocking: bool = True) -> None:
        """Raises `CannotConnect` if it is no path, or no socket can be had."""
        _check(member, path)
        self.member = member
        self.path = os.fsencode(path)
        self.is_connected = False
        self.cause = ""  # why it is not, if anything is known of that
        self._said = path
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self.cause = error.strerror or str(error)
            raise self.error() from None
        self.sock.setblocking(blocking)
        refuse_rights(self.sock)  # before anybody can pass one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def error(self) -> CannotConnect:
        return CannotConnect(f"{self.member}: cannot connect to {self._said}: {self.cause or _TOO_LATE}")


def _next_report(attempt: Attempt, deadline: Deadline, still_wanted: Callable[[], bool]) -> Report | None:
    """Return what there is to report next, None once the attempt has ended. Raises `TimedOut`."""
    while True:
        try:
            return attempt.next_report(Deadline(min(_INTERVAL, deadline.remaining())))
        except TimedOut:
            if not deadline.remaining():
                raise
        if not still_wanted():
            raise _NotWanted


def _check(member: str, path: str) -> None:
    """Refuse what is no place in the file system. Raises `CannotConnect`."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise CannotConnect(f"{member}: a path of {size} bytes, the limit is {MAX_SOCKET_PATH}")
    if not path.startswith("/") or "\0" in path:
        raise CannotConnect(f"{member}: not an absolute path: {path!r}")
