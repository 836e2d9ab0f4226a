"""Passing an fd over an AF_UNIX socket: one byte `F` with SCM_RIGHTS (docs/protocol.md, allocateIO)."""

import array
import errno
import os
import socket

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import ProtocolError

#: The byte that carries the fd.
TAG = b"F"

_INT = array.array("i").itemsize


def write_fd(sock: socket.socket, fd: int, *, timeout: float | Deadline | None = None) -> None:
    """Send a duplicate of `fd`, separately from any message. `fd` itself stays open and the caller's.

    `timeout` is in seconds; None waits for ever. Raises `TimedOut`, or `OSError` if the peer has gone.
    Any thread may call, one at a time for each socket.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    deadline = Deadline(timeout)
    while True:
        deadline.wait_writable(sock, "the fd")
        try:
            sock.sendmsg([TAG], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            continue
        return


def read_fd(sock: socket.socket, *, timeout: float | Deadline | None = None) -> int:
    """Receive the fd that was sent with `write_fd`. It is close-on-exec, and the caller closes it.

    `timeout` is in seconds; None waits for ever. Raises `ProtocolError` if anything but one byte `F` with
    exactly one fd arrives (fds that arrived are closed then), `TimedOut`, or `OSError`: with EMFILE if this
    process has no room for another fd.
    Any thread may call, one at a time for each socket.
    """
    # Room for one fd more than allowed: MSG_CTRUNC without any fd then means that this process has no room
    # for it, not that the peer sent too many.
    room = socket.CMSG_SPACE(2 * _INT)
    deadline = Deadline(timeout)
    while True:
        deadline.wait_readable(sock, "the fd")
        try:
            tag, ancillary, flags, _ = sock.recvmsg(1, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            continue
        break
    fds = _fds_in(ancillary)
    if tag == TAG and len(fds) == 1 and not flags & socket.MSG_CTRUNC:
        return fds[0]
    for fd in fds:
        os.close(fd)
    if flags & socket.MSG_CTRUNC and not fds:
        raise OSError(errno.EMFILE, "an fd came that could not be taken")
    if not tag:
        raise ProtocolError("the connection was closed where an fd should have come")
    raise ProtocolError(f"expected byte {TAG!r} with one fd, got {tag!r} with {len(fds)}")


def _fds_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT])
    return fds.tolist()
