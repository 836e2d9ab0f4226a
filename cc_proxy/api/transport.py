"""Whole messages over a connected stream socket, within a deadline.

Reading a message takes no byte beyond its end, because an fd that follows comes with a byte of its own. The
socket may be blocking or not; its mode does not change.
"""

import errno
import math
import socket
import struct
from typing import TypeVar

import msgspec

from cc_proxy.api import messages
from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import ProtocolError, TimedOut

#: Where the daemon listens unless its settings say otherwise.
DEFAULT_SOCKET = "/run/cc-oci-runtime/proxy.sock"

T = TypeVar("T", bound=msgspec.Struct)

#: The most that is read at once: the length that a peer announces must not decide how much is allocated.
LARGEST_READ = 64 * 1024
_LONGEST_WAIT = 86_400.0
_TIMEVAL = struct.Struct("@ll")


def connect(path: str, *, timeout: float | Deadline | None = None) -> socket.socket:
    """Connect to the AF_UNIX stream socket at `path`; returns a blocking socket.

    Waits while the backlog is full. `timeout` is in seconds; None waits for ever. Raises `TimedOut`, or an
    `OSError` with the path as its `filename`. Any thread may call.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connect_socket(sock, path, timeout)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_socket(sock: socket.socket, path: str, timeout: float | Deadline | None) -> None:
    """Connect a blocking AF_UNIX socket, as `connect` does. If that fails, the caller closes it."""
    deadline = Deadline(timeout)
    try:
        connected = False
        while not connected:
            # connect(2) obeys the timeout of send(2). 0 would mean for ever, so it is never quite 0.
            limit_send(sock, max(deadline.remaining(), 1e-6))
            sock.connect(path)
            # If a signal interrupts connect(2), Python assumes that the kernel goes on connecting in the
            # background. For AF_UNIX it does not.
            connected = _has_peer(sock)
        limit_send(sock, 0.0)
    except BlockingIOError:
        raise TimedOut(f"timed out connecting to {path}") from None
    except OSError as error:
        if error.errno is not None:
            error.filename = path
        raise


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True


def limit_receive(sock: socket.socket, seconds: float) -> None:
    """Make each recv(2) on a blocking socket wait `seconds` at most, then raise `BlockingIOError`.

    0 means for ever. Any thread may call.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))


def limit_send(sock: socket.socket, seconds: float) -> None:
    """Limit each send(2) and connect(2) on a blocking socket, as `limit_receive` limits recv(2)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))


def _timeval(seconds: float) -> bytes:
    """Return the kernel's form of `seconds`, rounded up: 0 would mean for ever."""
    whole, micro = divmod(math.ceil(min(seconds, _LONGEST_WAIT) * 1_000_000), 1_000_000)
    return _TIMEVAL.pack(whole, micro)


def read_message(
    sock: socket.socket,
    kind: type[T],
    *,
    timeout: float | Deadline | None = None,
    limit: int = messages.MAX_TEXT,
) -> T | None:
    """Read one message and return it, decoded as `kind`, which is `Request` or `Response`.

    Returns None if the peer closed the connection between two messages. The text may have `limit` bytes.
    `timeout` is for the whole message, in seconds; None waits for ever. Raises `ProtocolError` for anything
    else that the peer sends or fails to send, `TimedOut`, or `OSError`. Any thread may call, one at a time
    for each socket.
    """
    deadline = Deadline(timeout)
    header = _read_exactly(sock, messages.HEADER.size, deadline)
    if not header:
        return None
    return messages.decode(_read_rest(sock, header, deadline, limit), kind)


def write_message(
    sock: socket.socket, message: msgspec.Struct, *, timeout: float | Deadline | None = None
) -> None:
    """Send one message: header and text in a single write if the socket takes it.

    `timeout` is for the whole message, in seconds; None waits for ever. Raises `ProtocolError` if the text
    is longer than 1 MiB, `TimedOut`, or `OSError` if the peer has gone.
    Any thread may call, one at a time for each socket.
    """
    left = memoryview(messages.encode(message))
    deadline = Deadline(timeout)
    while left:
        try:
            left = left[sock.send(left, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            deadline.wait_writable(sock, "room for a message")


def _read_rest(sock: socket.socket, header: bytes, deadline: Deadline, limit: int) -> bytes:
    if len(header) < messages.HEADER.size:
        raise ProtocolError("the connection was closed inside a message header")
    length = messages.text_length(header, limit)
    text = _read_exactly(sock, length, deadline)
    if len(text) < length:
        raise ProtocolError(f"the connection was closed after {len(text)} of {length} bytes of a message")
    return text


def _read_exactly(sock: socket.socket, size: int, deadline: Deadline) -> bytes:
    """Read `size` bytes, or fewer if the peer closes first."""
    pieces: list[bytes] = []
    while size:
        deadline.wait_readable(sock, "a message")
        try:
            piece = sock.recv(min(size, LARGEST_READ), socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
