"""A client of the proxy, on one connection."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import msgspec
from msgspec import UNSET

from cc_proxy.api import messages
from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import ProtocolError, Refused, TimedOut
from cc_proxy.api.fdpassing import read_fd
from cc_proxy.api.payloads import (
    AllocateIo,
    AllocateIoResult,
    Attach,
    Bye,
    GetStatus,
    Hello,
    Hyper,
    LogLevelChange,
    Payload,
    Request,
    Response,
    SetLogLevel,
    Version,
)
from cc_proxy.api.status import Status
from cc_proxy.api.transport import DEFAULT_SOCKET, connect, read_message, write_message

T = TypeVar("T", bound=msgspec.Struct)


class AllocatedIo(NamedTuple):
    """The first stream's seq, and the fd of the streams, which the caller must close."""

    io_base: int
    fd: int


class Client:
    """One connection to the proxy, and the requests to make on it (docs/protocol.md, 1).

    `connection` is the path of the proxy's socket, or a connected stream socket, which then belongs to the
    client and is closed with it. `timeout` is how long each request may take, in seconds; None waits for
    ever. Each method takes a `timeout` of its own, which overrides it unless it is None. Pass a `Deadline`
    instead of a number to set one limit for several requests together.

    Every method raises `Refused`, with the daemon's text, if the daemon refuses the request. Nothing has
    changed then, and the connection stays usable, unless the daemon has closed it too: it does so if the user
    may not connect, or is over a limit on connections. `ProtocolError`, `TimedOut` and `OSError` leave the
    connection in an unknown state: after one of them every request raises `ProtocolError`, and all that is
    left to do is to close the client.

    One thread at a time may use a client. A client is a context manager, which closes it at the end.
    """

    def __init__(
        self,
        connection: socket.socket | str | os.PathLike[str] = DEFAULT_SOCKET,
        *,
        timeout: float | Deadline | None = None,
    ) -> None:
        self._timeout = timeout
        if isinstance(connection, socket.socket):
            self._sock, self._peer = connection, "the other end"
        else:
            self._peer = os.fspath(connection)
            self._sock = connect(self._peer, timeout=timeout)
        self._broken = False

    def hello(
        self,
        container_id: str,
        ctl_serial: str,
        io_serial: str,
        console: str = "",
        *,
        timeout: float | Deadline | None = None,
    ) -> int:
        """Register a VM and attach this connection to it; returns the protocol version.

        `ctl_serial`, `io_serial` and `console` are the absolute paths of the VM's sockets. The daemon answers
        once the VM is ready, which may take as long as its setting `vm.ready_timeout` allows.
        """
        return self._result(Hello(container_id, ctl_serial, io_serial, console), Version, timeout).version

    def attach(self, container_id: str, *, timeout: float | Deadline | None = None) -> int:
        """Attach this connection to a registered VM; returns the protocol version."""
        return self._result(Attach(container_id), Version, timeout).version

    def bye(self, container_id: str, *, timeout: float | Deadline | None = None) -> None:
        """Unregister a VM; its id can be used again at once."""
        self.request(Bye(container_id), timeout=timeout)

    def allocate_io(self, n_streams: int = 1, *, timeout: float | Deadline | None = None) -> AllocatedIo:
        """Allocate 1 stream (stdin and stdout) or 2 (stderr as well), and return them with their fd.

        This connection must be attached to a VM.
        """
        deadline = self._deadline(timeout)
        result = self._result(AllocateIo(n_streams), AllocateIoResult, deadline)
        with self._exchange():
            return AllocatedIo(result.io_base, read_fd(self._sock, timeout=deadline))

    def hyper(self, name: str, data: Any = UNSET, *, timeout: float | Deadline | None = None) -> None:
        """Send a command to the agent; returns once the agent has acknowledged it.

        `data` is any value that msgspec can encode as JSON. `bytes` and `msgspec.Raw` are taken as JSON text,
        which reaches the agent byte for byte. If `data` is left out, or is empty text, the command has none.
        This connection must be attached to a VM.
        """
        if not isinstance(data, bytes | msgspec.Raw | msgspec.UnsetType):
            data = msgspec.json.encode(data)
        encoded = b"" if isinstance(data, msgspec.UnsetType) else bytes(data)
        self.request(Hyper(name, msgspec.Raw(encoded) if encoded else UNSET), timeout=timeout)

    def status(self, *, timeout: float | Deadline | None = None) -> Status:
        """Return the state of the daemon and its VMs: what waits in each of them, and for which client.

        The daemon waits half a second at most for its VMs. One that is too old to know this request refuses
        it.
        """
        return self._result(GetStatus(), Status, timeout)

    def set_log_level(self, level: str, *, timeout: float | Deadline | None = None) -> LogLevelChange:
        """Make the daemon log events of `level` and above, until it next reads its settings.

        `level` is `error`, `warning`, `info`, `debug`, `io` or `console`. Returns the old and the new level.
        """
        return self._result(SetLogLevel(level), LogLevelChange, timeout)

    def request(self, payload: Payload, *, timeout: float | Deadline | None = None) -> msgspec.Raw:
        """Send any payload; returns the `data` of the response as JSON text, empty if there is none.

        Use `allocate_io` instead of sending an `AllocateIo`: it also takes the fd that follows the response.
        """
        request = Request(payload.NAME, msgspec.Raw(msgspec.json.encode(payload)))
        deadline = self._deadline(timeout)
        limit = messages.MAX_STATUS if isinstance(payload, GetStatus) else messages.MAX_TEXT
        with self._exchange():
            self._write(request, deadline)
            try:
                response = self._read(deadline, limit)
            except TimedOut:
                raise TimedOut(f"{self._peer} has not answered {payload.NAME} in time") from None
            if response is None:
                raise ProtocolError(f"the proxy closed the connection instead of answering {payload.NAME}")
        if not response.success:
            raise Refused(response.error)
        return msgspec.Raw() if isinstance(response.data, msgspec.UnsetType) else response.data

    def fileno(self) -> int:
        """Return the connection's fd. Between requests it becomes readable only when the daemon closes it."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection. A VM that was registered over it stays registered."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, timeout: float | Deadline | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)

    def _result(self, payload: Payload, kind: type[T], timeout: float | Deadline | None) -> T:
        data = self.request(payload, timeout=timeout)
        with self._exchange():
            return messages.decode(bytes(data), kind)

    def _write(self, request: Request, deadline: Deadline) -> None:
        """Send a request. If that fails because the daemon has refused this client, raise `Refused`."""
        try:
            write_message(self._sock, request, timeout=deadline)
        except OSError:
            response = self._said()
            if response is None or response.success:
                raise
            raise Refused(response.error) from None

    def _said(self) -> Response | None:
        """Return the response that has already arrived, if any.

        Raises `ProtocolError` if what has arrived is not a response.
        """
        try:
            return self._read(Deadline(0))
        except OSError:
            return None

    def _read(self, deadline: Deadline, limit: int = messages.MAX_TEXT) -> Response | None:
        """Read a response; None if the daemon closed the connection. A `ProtocolError` names the socket."""
        try:
            return read_message(self._sock, Response, timeout=deadline, limit=limit)
        except ProtocolError as error:
            raise ProtocolError(f"{self._peer} is not cc-proxy, or it failed: {error}") from None

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Raise `ProtocolError` if an earlier exchange failed. An error inside makes this one fail."""
        if self._broken:
            raise ProtocolError("an earlier request failed half-way; close this client and make another")
        self._broken = True
        yield
        self._broken = False
