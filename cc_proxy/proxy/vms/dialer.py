"""Connecting to the sockets that a hello names, with the rights of its client."""

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
from cc_proxy.proxy.rest import LOOK_UP
from cc_proxy.proxy.vms.connector import Attempt, Connector, Report, TooManyHang
from cc_proxy.proxy.vms.connector_process import NOT_ALLOWED, NOT_STARTED

#: Seconds to wait for the console once the channels are connected.
_CONSOLE_TIMEOUT = 0.25
#: Which of the sockets to connect are channels. The third is the console.
_CHANNELS = 0, 1

_TOO_LATE = "not accepted in time"

#: The other end of a socket, whatever path led there: the name it was bound to, and the listener's pid.
Peer = tuple[str, int]


class CannotConnect(Exception):
    """A socket cannot be connected; the text names the member of hello, and the reason."""


@dataclass(slots=True)
class Connected:
    """The sockets of a VM, which it owns: a context manager that closes them. One thread."""

    ctl: socket.socket
    io: socket.socket
    #: None if hello names none, or if it could not be connected; `console_error` then says why.
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

    The kernel itself checks the client's rights to each directory of a path and to the socket, at the moment
    it connects; a check beforehand could be out of date by then. The listener sees the client's uid and gid.
    """

    def __init__(
        self,
        client: Credentials,
        connector: Connector,
        own_address: str | bytes | None = None,
        claim: Callable[[Peer], str] = lambda _: "",
    ) -> None:
        """`own_address` is the address of the daemon's own socket, which cannot be a VM's.

        `claim` is called with the peer of each channel. It returns why the peer cannot be used; empty if it
        can.
        """
        self._claim = claim
        self._client = client
        self._connector = connector
        self._own_address = own_address

    def connect(
        self,
        hello: Hello,
        timeout: float | Deadline,
        *,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> Connected:
        """Connect to the channels that a hello names, and to its console if it names one.

        While a channel's socket does not exist yet, or its backlog is full, this tries again for `timeout`
        seconds, as long as `still_wanted` returns true. The console gets one try: a VM can do without it.
        Raises `CannotConnect`, or `RuntimeError` if no process can be started; nothing is left open then.
        """
        with contextlib.ExitStack() as undo:
            ctl = _Socket("ctlSerial", hello.ctl_serial, undo)
            io = _Socket("ioSerial", hello.io_serial, undo)
            connected, sockets = Connected(ctl.sock, io.sock), [ctl, io]
            if hello.console:
                try:
                    sockets.append(_Socket("console", hello.console, undo, blocking=False))
                except CannotConnect as error:
                    connected.console_error = str(error)
            self._dial(sockets, Deadline(timeout), still_wanted)
            for channel in (ctl, io):
                if not channel.is_connected:
                    raise channel.error()
            undo.pop_all()
        for console in sockets[len(_CHANNELS) :]:
            if console.is_connected:
                connected.console = console.sock
            else:
                connected.console_error = str(console.error())
                console.sock.close()
        return connected

    def _dial(
        self, sockets: Sequence["_Socket"], deadline: Deadline, still_wanted: Callable[[], bool]
    ) -> None:
        """Connect sockets in this order, and record in each how that went. Raises what `connect` raises."""
        first, *_ = sockets
        targets = [(each.sock, each.path) for each in sockets]
        try:
            with self._connector.connecting(self._client, targets, deadline) as attempt:
                self._follow(attempt, sockets, deadline, still_wanted)
        except TimedOut:
            return
        except TooManyHang as error:
            first.cause = str(error)
        except OSError as error:
            first.cause = error.strerror or str(error)

    def _follow(
        self,
        attempt: Attempt,
        sockets: Sequence["_Socket"],
        deadline: Deadline,
        still_wanted: Callable[[], bool],
    ) -> None:
        """Record in each socket how connecting it goes, until there is nothing left to wait for."""
        while deadline.remaining():
            try:
                report = attempt.next_report(Deadline(min(LOOK_UP, deadline.remaining())))
            except TimedOut:
                if still_wanted():
                    continue
                cause = sockets[0].cause or _TOO_LATE
                sockets[0].cause = f"{cause}, and nobody waits for it any more"
                return
            if report is None:
                for each in sockets:
                    each.cause = each.cause or "the process that was to connect has been killed"
                return
            if not self._take_in(report, sockets):
                return
            if all(sockets[channel].is_connected for channel in _CHANNELS):
                deadline = Deadline(min(_CONSOLE_TIMEOUT, deadline.remaining()))

    def _take_in(self, report: Report, sockets: Sequence["_Socket"]) -> bool:
        """Record in a socket how its last try went; returns whether to go on."""
        if report.number == NOT_STARTED:
            raise RuntimeError(f"no process to connect from: {os.strerror(report.errno)}")
        if report.number == NOT_ALLOWED:
            raise CannotConnect(f"{sockets[0].member}: {CannotAct(self._client.uid, report.errno)}")
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
        """Return why the peer of a socket cannot be used; empty if it can."""
        # The name it was bound to, whatever links and mounts led there.
        name = sock.getpeername()
        if self._own_address is not None and name == self._own_address:
            return "that is the daemon itself"
        # The name may be any bytes, but has to be text to be handed over to the next process.
        text = os.fsencode(name).decode(errors="backslashreplace")
        return self._claim((text, Credentials.of_peer(sock).pid)) if is_channel else ""


class _Socket:
    """A socket for a path of a hello, and how connecting it goes."""

    def __init__(self, member: str, path: str, undo: contextlib.ExitStack, *, blocking: bool = True) -> None:
        """Have `undo` close it. Raises `CannotConnect` if the path is not usable, or no fd is left."""
        _check(member, path)
        self.member = member
        self.path = os.fsencode(path)
        self.is_connected = False
        self.cause = ""  # why it is not connected, as far as it is known
        self._said = path
        try:
            self.sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        except OSError as error:
            self.cause = error.strerror or str(error)
            raise self.error() from None
        self.sock.setblocking(blocking)
        refuse_rights(self.sock)  # before the peer can pass an fd

    def error(self) -> CannotConnect:
        return CannotConnect(f"{self.member}: cannot connect to {self._said}: {self.cause or _TOO_LATE}")


def _check(member: str, path: str) -> None:
    """Raise `CannotConnect` unless `path` is absolute, and not too long for a socket."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise CannotConnect(f"{member}: a path of {size} bytes, the limit is {MAX_SOCKET_PATH}")
    if not path.startswith("/") or "\0" in path:
        raise CannotConnect(f"{member}: not an absolute path: {path!r}")
