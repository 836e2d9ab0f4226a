"""Helpers for file descriptors and sockets, beyond reading and writing."""

import contextlib
import errno
import fcntl
import os
import resource
import socket
import stat
import struct
import sys
import termios
import time
from collections.abc import Sequence

#: Bytes to be passed on without copying.
Piece = bytes | memoryview

#: All threads read unwanted bytes into this. Made once, because memory may be short later.
_SCRATCH = bytearray(64 * 1024)
#: The most pieces that one system call takes (<limits.h>).
IOV_MAX = 1024
#: What unix_stream_sendmsg limits its buffers by (net/unix/af_unix.c): UNIX_SKB_FRAGS_SZ, and an allowance
#: of 64 bytes for overhead.
_KERNEL_BUFFER = 32 * 1024
_OVERHEAD = 64
_FD = struct.Struct("i")
#: Errors of a call for which the kernel has no memory.
_SHORT_OF_MEMORY = frozenset({errno.ENOBUFS, errno.ENOMEM})
#: Seconds to wait then. The fd stays ready, so without a pause its thread would spin.
_BREATH = 0.001
#: Since Linux 6.16; Python's `socket` has no name for it.
_SO_PASSRIGHTS = 83
#: <asm-generic/socket.h>
_SO_COOKIE = 57


class Fd:
    """An open fd in a value that is handed over. The receiver of the value owns the fd."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


#: Device, inode and cookie tell what an fd stands for, in any process. The cookie is needed because inodes of
#: sockets wrap around after 2^32 of them.
Identity = tuple[int, int, int]


def identity_of(fd: int) -> Identity:
    """Return what an fd stands for. Raises `OSError` if it is closed."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, _cookie(fd) if stat.S_ISSOCK(status.st_mode) else 0


def _cookie(fd: int) -> int:
    """Return the number that the kernel gives to this socket and to no other."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
    finally:
        sock.detach()


def raise_fd_limit() -> int:
    """Raise this process's soft limit of open files to the hard limit; returns that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def refuse_rights(sock: socket.socket) -> None:
    """Make an AF_UNIX socket, and those accepted on it, refuse fds: a peer that passes one gets EPERM.

    Closing an unwanted fd can take as long as its sender chooses: a TCP socket with unsent data and SO_LINGER
    sleeps in close(2). Does nothing if the kernel does not support this.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def may_hold_fds(sock: socket.socket) -> bool:
    """Whether a socket accepts fds, so that reading or closing it may take long."""
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS))
    except OSError:
        return True


def holds_fds(sock: socket.socket) -> bool:
    """Whether unread fds wait on a stream socket. Also True if too many bytes wait in front to tell.

    No more come after `shutdown(SHUT_RD)`. This reads nothing, and never blocks.
    """
    try:
        # There is no room for fds, so MSG_CTRUNC shows that there are some.
        size, _, flags, _ = sock.recvmsg_into([_SCRATCH], 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return size == len(_SCRATCH) or bool(flags & socket.MSG_CTRUNC)


def check_passable(sock: socket.socket, peer: socket.socket) -> None:
    """Check that `peer`, which is connected to `sock`, could be passed to a client now.

    Raises `OSError` if not: the kernel refuses once too many fds are in flight.
    """
    sock.sendmsg([b"?"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(peer.fileno()))])
    peer.recv(1)


def close_stream(sock: socket.socket) -> None:
    """Close a stream socket so that the peer reads what was sent, and then end of file.

    If an AF_UNIX socket is closed while something waits unread, the peer gets ECONNRESET instead of end of
    file. So this shuts the socket down, and reads what is there, before it closes. Never raises, and blocks
    only in closing fds that were passed to it (see `refuse_rights`).
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
        while sock.recv_into(_SCRATCH, 0, socket.MSG_DONTWAIT):
            pass
    sock.close()


def unread(sock: socket.socket | int) -> int:
    """Return how many bytes wait unread on a stream socket."""
    return _ask(sock, termios.FIONREAD)


def untaken(sock: socket.socket) -> int:
    """Return how many bytes of memory the data holds that the peer has not read; 0 if it has read all."""
    return _ask(sock, termios.TIOCOUTQ)  # the same number as SIOCOUTQ


def _ask(sock: socket.socket | int, question: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock, question, bytes(4)), sys.byteorder)


def is_for_now(error: OSError) -> bool:
    """Whether a call on a non-blocking fd may succeed later: there was no room, or no memory.

    If there was no memory, sleeps for a millisecond first.
    """
    if error.errno in _SHORT_OF_MEMORY:
        time.sleep(_BREATH)
        return True
    return isinstance(error, BlockingIOError)


def taken_whole(sock: socket.socket) -> int:
    """Return how many bytes one send can have for an AF_UNIX stream socket to take all of them or none.

    The kernel copies what is sent into buffers, and there is room for a whole buffer or for none of it. A
    buffer is at most half as long as all that the socket may hold, less the overhead.
    """
    half = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    return min(_KERNEL_BUFFER, half - _OVERHEAD)


def receive_into(sock: socket.socket, view: memoryview) -> int:
    """Read once from a non-blocking socket; returns how many bytes came, 0 at end of file.

    Raises `BlockingIOError` if there is nothing for now, or another `OSError`.
    """
    try:
        return sock.recv_into(view)
    except OSError as error:
        if is_for_now(error):
            raise BlockingIOError from None
        raise


def send_pieces(sock: socket.socket, pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Send pieces in order on a non-blocking socket; returns what it did not take.

    Raises `OSError` if the peer has gone.
    """
    if len(pieces) == 1:
        # The most frequent case gets the fewest steps.
        try:
            sent = sock.send(pieces[0])
        except OSError as error:
            if not is_for_now(error):
                raise
            return pieces
        return () if sent == len(pieces[0]) else cut(pieces, sent)
    while pieces:
        some = pieces if len(pieces) <= IOV_MAX else pieces[:IOV_MAX]
        size = sum(map(len, some))
        try:
            sent = sock.sendmsg(some)
        except OSError as error:
            if not is_for_now(error):
                raise
            return pieces
        if sent < size:
            return cut(pieces, sent)
        pieces = pieces[len(some) :]
    return pieces


def cut(pieces: Sequence[Piece], start: int, stop: int = sys.maxsize) -> list[Piece]:
    """Return the bytes from `start` to `stop` of the pieces taken together, without copying any."""
    found: list[Piece] = []
    at = 0
    for piece in pieces:
        begin, end = max(0, start - at), min(len(piece), stop - at)
        if begin < end:
            found.append(memoryview(piece)[begin:end])
        at += len(piece)
    return found


def hung_up_socket() -> socket.socket:
    """Return a socket whose peer has hung up. Raises `OSError`."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours
