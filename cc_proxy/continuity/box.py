"""A box for fds, kept by the kernel: what was put into it stays as long as any process has the box open."""

import array
import errno
import fcntl
import os
import resource
import socket
import sys
import termios
from collections.abc import Iterable, Mapping, Sequence

from cc_proxy.linux.fds import Identity, identity_of

#: The most that one message takes (<net/scm.h>).
_MOST_FDS = 253
_ROOM = socket.CMSG_SPACE(_MOST_FDS * array.array("i").itemsize)
#: <asm-generic/socket.h>; Python's `socket` has no name for it.
_SO_PEEK_OFF = 42
#: Each message carries one byte beside its fds, which says what they are: kept fds, or the memfd of a state.
_KEPT, _STATE = b"k", b"s"
#: Bytes of the socket's buffer, which has room for some 550 messages.
_BUFFER = 212_992
#: With this many messages or more, it is time to pack their fds into fewer.
_MANY = 256


class Box:
    """A socket pair: fds that were sent from one end and not received at the other wait in the kernel.

    A process that has both ends can take out what is in the box. The kernel discards it when no process has
    either end. One thread at a time.
    """

    def __init__(self, ends: Sequence[socket.socket] = ()) -> None:
        """Make an empty box, or take over the two ends of one that may have something in it."""
        first, second = ends or socket.socketpair()
        for end in (first, second):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        # The end at which something waits is the receiving end.
        self._sender, self._receiver = (second, first) if _waiting(first) else (first, second)
        self._messages = _waiting(self._receiver)
        # Messages are numbered: the oldest one's number, and that of the last message with each known thing.
        self._first = 0
        self._places: dict[Identity, int] = {}

    @property
    def ends(self) -> tuple[socket.socket, socket.socket]:
        """Both ends, which `close` closes."""
        return self._sender, self._receiver

    @property
    def messages(self) -> int:
        """How many messages are in it."""
        return self._messages

    @property
    def is_crowded(self) -> bool:
        """Whether it is time to pack its fds into fewer messages."""
        return self._messages >= _MANY

    def has(self, identity: Identity) -> bool:
        """Whether something is in it, as far as this process has put it in or looked at it."""
        return self._places.get(identity, -1) >= self._first

    def put(self, fds: Mapping[int, Identity]) -> None:
        """Put fds in, which stay open in this process. Raises `OSError`, and then some may be in it."""
        pairs = [*fds.items()]
        for first in range(0, len(pairs), _MOST_FDS):
            some = dict(pairs[first : first + _MOST_FDS])
            self._send(_KEPT, [*some])
            self._note(some.values(), self._first + self._messages - 1)

    def pack(self, fds: Mapping[int, Identity]) -> None:
        """Have it hold these fds in few messages, and nothing else. At no moment is any of them missing.

        Raises `OSError`, and then only some are packed.
        """
        end = self._first + self._messages
        left = sorted(fds.items(), key=lambda pair: self._places.get(pair[1], -1))
        while left:
            some, left = left[:_MOST_FDS], left[_MOST_FDS:]
            self.put(dict(some))
            if left:  # drop only what is older than those, which are still in their old messages
                self.drop(self._places.get(left[0][1], -1) - self._first)
        self.drop(end - self._first)
        self._places = {identity: self._places[identity] for identity in fds.values()}

    def put_state(self, state: bytes, fds: Mapping[int, Identity]) -> None:
        """Put in a state, and those of its fds that are not in the box yet. Raises `OSError`, as `put`."""
        with open(os.memfd_create("cc-proxy-state"), "wb", buffering=0) as file:
            left = memoryview(state)
            while left:
                left = left[file.write(left) :]
            self._send(_STATE, [file.fileno()])
        self.put({fd: identity for fd, identity in fds.items() if not self.has(identity)})

    def drop(self, messages: int) -> None:
        """Discard the oldest messages. Raises `OSError`."""
        for _ in range(messages):
            self._receiver.recv(1)  # which leaves no room for the fds, so the kernel closes them
            self._messages -= 1
            self._first += 1

    def look(self) -> tuple[bytes, list[int]]:
        """Return the last state, empty if there is none, and new fds for all kept ones.

        Everything stays in the box. The same thing may be there several times. Raises `OSError`.
        """
        state, fds = b"", list[int]()
        self._receiver.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)  # each peek goes on after the last
        try:
            for number in range(_waiting(self._receiver)):
                mark, some = self._peek()
                if mark == _STATE:
                    state = _read(some[0])
                else:
                    fds += some
                    self._note(map(identity_of, some), self._first + number)
        except BaseException:
            close_all(fds)
            raise
        finally:
            self._receiver.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
        return state, fds

    def close(self) -> None:
        """Close both ends."""
        self._sender.close()
        self._receiver.close()

    def _send(self, mark: bytes, fds: Sequence[int]) -> None:
        try:
            self._sender.sendmsg([mark], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            why = f"the kernel keeps no more than {limit} fds: raise LimitNOFILE= of cc-proxy.service"
            raise OSError(error.errno, why) from None
        self._messages += 1

    def _note(self, identities: Iterable[Identity], place: int) -> None:
        self._places.update(dict.fromkeys(identities, place))

    def _peek(self) -> tuple[bytes, list[int]]:
        flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
        mark, control, received, _ = self._receiver.recvmsg(1, _ROOM, flags)
        fds = array.array("i")
        for _, _, data in control:
            fds.frombytes(data)
        if received & socket.MSG_CTRUNC:
            close_all(fds)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return mark, list(fds)


def close_all(fds: Iterable[int]) -> None:
    """Close fds."""
    for fd in fds:
        os.close(fd)


def _read(memory: int) -> bytes:
    """Return what is in a memfd, and close it."""
    try:
        return os.pread(memory, os.fstat(memory).st_size, 0)
    finally:
        os.close(memory)


def _waiting(sock: socket.socket) -> int:
    """Return how many bytes wait there; each message has one."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)
