"""A client of the proxy over one connection."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import msgspec

from cc_proxy.api import messages
from cc_proxy.api.errors import ProtocolError, Refused
from cc_proxy.api.fdpassing import read_fd
from cc_proxy.api.payloads import (
    AllocateIo,
    AllocateIoResult,
    Attach,
    Bye,
    Hello,
    Hyper,
    Payload,
    Request,
    Response,
    Version,
)
from cc_proxy.api.transport import read_message, write_message

#: Where the daemon listens unless its settings say otherwise.
DEFAULT_SOCKET = "/run/cc-oci-runtime/proxy.sock"

_NO_DATA = msgspec.Raw()

T = TypeVar("T", bound=msgspec.Struct)


class AllocatedIo(NamedTuple):
    """The streams `allocate_io` got: their first number, and the fd that carries them (yours to close)."""

    io_base: int
    fd: int


class Client:
    """One connection to the proxy, and the requests one can make over it (protocol.md, 1).

    `connection` is the path of the proxy's socket, or a stream socket that is connected already (which
    then belongs to the client and is closed with it). `timeout` is the deadline of each request in
    seconds, None waits for ever; each method takes one of its own in its place.

    Every method raises `Refused` with the daemon's text if the daemon said no: nothing has changed then
    and the connection stays usable. `ProtocolError`, `TimedOut` and `OSError` leave it in an unknown
    state: from then on every request raises `ProtocolError`, and `close` is all that is left.

    One thread at a time may use a client; it is a context manager that closes on the way out.
    """

    def __init__(
        self,
        connection: socket.socket | str | os.PathLike[str] = DEFAULT_SOCKET,
        *,
        timeout: float | None = None,
    ) -> None:
        self._sock = connection if isinstance(connection, socket.socket) else _connect(os.fspath(connection))
        self._timeout = timeout
        self._broken = False

    def hello(
        self,
        container_id: str,
        ctl_serial: str,
        io_serial: str,
        console: str = "",
        *,
        timeout: float | None = None,
    ) -> int:
        """Register the VM behind two sockets and attach to it; returns the protocol version.

        Comes back once the VM is ready, which may take the daemon's whole ready timeout.
        """
        return self._result(Hello(container_id, ctl_serial, io_serial, console), Version, timeout).version

    def attach(self, container_id: str, *, timeout: float | None = None) -> int:
        """Attach this connection to a registered VM; returns the protocol version."""
        return self._result(Attach(container_id), Version, timeout).version

    def bye(self, container_id: str, *, timeout: float | None = None) -> None:
        """Unregister a VM; its id can be used again at once."""
        self.request(Bye(container_id), timeout=timeout)

    def allocate_io(self, n_streams: int = 1, *, timeout: float | None = None) -> AllocatedIo:
        """Get 1 stream number (stdin and stdout) or 2 (and stderr), and the fd that carries their frames."""
        result = self._result(AllocateIo(n_streams), AllocateIoResult, timeout)
        with self._exchange():
            return AllocatedIo(result.io_base, read_fd(self._sock, timeout=self._seconds(timeout)))

    def hyper(self, name: str, data: Any = _NO_DATA, *, timeout: float | None = None) -> None:
        """Have the agent carry out a command and wait for its acknowledgement.

        `data` is any value with a JSON form; `bytes` and `msgspec.Raw` are taken as JSON text already and
        reach the agent byte for byte. Left out, the command carries no data.
        """
        if isinstance(data, bytes):
            data = msgspec.Raw(data)
        elif not isinstance(data, msgspec.Raw):
            data = msgspec.Raw(msgspec.json.encode(data))
        self.request(Hyper(name, data), timeout=timeout)

    def request(self, payload: Payload, *, timeout: float | None = None) -> msgspec.Raw:
        """Send any payload and return the `data` of the response, encoded (empty if there was none)."""
        with self._exchange():
            request = Request(payload.NAME, msgspec.Raw(msgspec.json.encode(payload)))
            write_message(self._sock, request, timeout=self._seconds(timeout))
            response = read_message(self._sock, Response, timeout=self._seconds(timeout))
            if response is None:
                raise ProtocolError(f"the proxy closed the connection instead of answering {payload.NAME}")
        if not response.success:
            raise Refused(response.error)
        return response.data

    def fileno(self) -> int:
        """The connection's fd, to wait on: it becomes readable when the daemon goes away."""
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

    def _seconds(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _result(self, payload: Payload, kind: type[T], timeout: float | None) -> T:
        data = self.request(payload, timeout=timeout)
        with self._exchange():
            return messages.decode(bytes(data), kind)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Refuse to begin after a failure, and count what fails inside as one."""
        if self._broken:
            raise ProtocolError("an earlier request failed half-way; close this client and make another")
        self._broken = True
        yield
        self._broken = False


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        # The message of connect(2) does not say which socket it was about.
        error.filename = path
        raise
    except BaseException:
        sock.close()
        raise
    return sock
