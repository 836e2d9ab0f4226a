"""A box for fds that is in no process: what was put into it stays for as long as somebody has it open."""

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import termios
from collections.abc import Sequence

#: The most that one message takes (<net/scm.h>).
_MOST_FDS = 253
_ROOM = socket.CMSG_SPACE(_MOST_FDS * array.array("i").itemsize)
#: <asm-generic/socket.h>; Python's `socket` has no name for it.
_SO_PEEK_OFF = 42
#: What each message carries beside the fds: whether another one follows.
_MORE, _LAST = b"+", b"."


class Box:
    """A socket pair: fds that were sent from one end, and not received at the other, wait in the kernel.

    One thread. Whoever has both ends can take out what is in it; it is gone once nobody has either.
    """

    def __init__(self, ends: Sequence[socket.socket] = ()) -> None:
        """Make an empty one, or take over the two ends of one that may have something in it."""
        first, second = ends or socket.socketpair()
        for end in (first, second):
            end.setblocking(False)
        # It is the receiving end where something waits.
        self._sender, self._receiver = (second, first) if _has_something(first) else (first, second)

    @property
    def ends(self) -> tuple[socket.socket, socket.socket]:
        """Both ends; each is closed by `close`, and the receiver by `leave_to`."""
        return self._sender, self._receiver

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not _has_something(self._receiver)

    @property
    def is_kept(self) -> bool:
        """Whether anybody has the receiving end open, which may be this process."""
        poll = select.poll()
        poll.register(self._sender, 0)
        return not poll.poll(0)

    def leave_to_keeper(self) -> None:
        """Empty it, and close the receiving end, which somebody else has open too. No matter if it is."""
        if self._receiver.fileno() >= 0:
            self.empty()
            self._receiver.close()

    def fill(self, fds: Sequence[int]) -> None:
        """Put fds into an empty box; those of this process stay open. Raises `OSError`, with some in it."""
        for first in range(0, len(fds), _MOST_FDS):
            some = fds[first : first + _MOST_FDS]
            mark = _LAST if first + _MOST_FDS >= len(fds) else _MORE
            self._sender.sendmsg([mark], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", some))])

    def look(self) -> list[int]:
        """Return new fds of all that is in it, in their order; it stays there. Raises `OSError`."""
        self._receiver.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)  # each look goes on behind the last
        fds: list[int] = []
        try:
            mark, is_whole = _MORE, True
            while mark == _MORE and is_whole:
                mark, some, is_whole = self._receive(socket.MSG_PEEK)
                fds += some
            if is_whole:
                return fds
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        finally:
            self._receiver.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)

    def empty(self) -> None:
        """Throw away what is in it. Never raises."""
        with contextlib.suppress(OSError):
            while _has_something(self._receiver):
                for fd in self._receive(0)[1]:
                    os.close(fd)

    def _receive(self, flags: int) -> tuple[bytes, list[int], bool]:
        """Return a message's mark and fds, and whether this process may have all of them."""
        mark, control, received, _ = self._receiver.recvmsg(1, _ROOM, flags | socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, data in control:
            fds.frombytes(data)
        return mark, list(fds), not received & socket.MSG_CTRUNC

    def close(self) -> None:
        """Close both ends."""
        self._sender.close()
        self._receiver.close()


def _has_something(sock: socket.socket) -> bool:
    return any(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
