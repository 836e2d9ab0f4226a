"""What this process does to file descriptors beyond reading and writing them."""

import contextlib
import errno
import fcntl
import resource
import socket
import struct
import sys
import termios
from collections.abc import Sequence

#: Bytes on their way that are not to be copied.
Piece = bytes | memoryview

#: What a socket says of this moment only: it is as it was, and may be tried again.
PASSING = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ENOMEM})

#: What nobody wants to read goes here, whichever thread reads it; made once, since memory may be short then.
_SCRATCH = bytearray(64 * 1024)
#: The most pieces that one call takes (<limits.h>).
IOV_MAX = 1024
_FD = struct.Struct("i")
#: Since Linux 6.16; Python's `socket` has no name for it.
_SO_PASSRIGHTS = 83


def raise_fd_limit() -> int:
    """Raise this process's soft limit of open files to the hard one; returns the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def refuse_rights(sock: socket.socket) -> None:
    """Let nobody pass fds to an AF_UNIX socket, or to those accepted on it: a peer that tries gets EPERM.

    Closing an fd that nobody wants can take as long as whoever passed it chose: a TCP socket with unsent
    data and SO_LINGER sleeps in close(2). Does nothing where the kernel does not know how.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def may_hold_fds(sock: socket.socket) -> bool:
    """Whether somebody may have passed fds to a socket, so that reading or closing it may take long."""
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS))
    except OSError:
        return True


def holds_fds(sock: socket.socket) -> bool:
    """Whether fds that were passed to a stream socket wait there, or so much else that it is not looked for.

    After `shutdown(SHUT_RD)` none come any more. Reads nothing, and never blocks.
    """
    try:
        # The kernel tells of fds for which it was given no room.
        size, _, flags, _ = sock.recvmsg_into([_SCRATCH], 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return size == len(_SCRATCH) or bool(flags & socket.MSG_CTRUNC)


def check_passable(sock: socket.socket, peer: socket.socket) -> None:
    """Find out whether `peer`, which is connected to `sock`, could be passed to somebody now.

    Raises `OSError` if not: the kernel passes no more once too many were passed that nobody has received.
    """
    sock.sendmsg([b"?"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(peer.fileno()))])
    peer.recv(1)


def close_stream(sock: socket.socket) -> None:
    """Close a stream socket so that the peer reads what was sent and then end of file.

    Closing an AF_UNIX socket on which something unread is waiting gives the peer ECONNRESET in place of end
    of file; so nothing more is let in, and what is there is read away first. Never raises, and blocks only
    in closing fds that were passed to it (see `refuse_rights`).
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
        while sock.recv_into(_SCRATCH, 0, socket.MSG_DONTWAIT):
            pass
    sock.close()


def unread(sock: socket.socket) -> int:
    """Return the bytes that have arrived at a stream socket and nobody has read yet."""
    return _ask(sock, termios.FIONREAD)


def untaken(sock: socket.socket) -> int:
    """Return the bytes of memory that is held by what was sent and the peer has not read yet; 0 if it has
    read all of that.
    """
    return _ask(sock, termios.TIOCOUTQ)  # which SIOCOUTQ is another name for


def _ask(sock: socket.socket, question: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock, question, bytes(4)), sys.byteorder)


def send_pieces(sock: socket.socket, pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Send pieces one after the other on a non-blocking socket; returns what it did not take.

    Raises `OSError` if the peer is gone.
    """
    if len(pieces) == 1:
        # What there is most often, in the fewest steps.
        try:
            sent = sock.send(pieces[0])
        except BlockingIOError:
            return pieces
        return () if sent == len(pieces[0]) else cut(pieces, sent)
    while pieces:
        some = pieces if len(pieces) <= IOV_MAX else pieces[:IOV_MAX]
        size = sum(map(len, some))
        try:
            sent = sock.sendmsg(some)
        except BlockingIOError:
            return pieces
        if sent < size:
            return cut(pieces, sent)
        pieces = pieces[len(some) :]
    return pieces


def cut(pieces: Sequence[Piece], start: int, stop: int = sys.maxsize) -> list[Piece]:
    """Return the bytes from `start` to `stop` of pieces that are thought of as one, without copying any."""
    found: list[Piece] = []
    at = 0
    for piece in pieces:
        begin, end = max(0, start - at), min(len(piece), stop - at)
        if begin < end:
            found.append(memoryview(piece)[begin:end])
        at += len(piece)
    return found
