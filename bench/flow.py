"""Moves bytes through sockets as fast as it can: what the generators of both sides share."""

import select
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.streams import BUFFER_SIZE, StreamCheck, WrongBytesError, cycle_of, repeated
from cc_proxy.api.transport import limit_receive, limit_send

#: After this many seconds without a byte, the other side is given up.
PATIENCE = 20.0


class StalledError(Exception):
    """No byte has moved for `PATIENCE` seconds, or the other side has hung up."""


@dataclass
class End:
    """One end of a connection that carries frames, with the VM and the streams whose frames they are."""

    sock: socket.socket
    vm: int
    seqs: tuple[int, ...]

    @property
    def name(self) -> str:
        which = f"stream {self.seqs[0]}" if len(self.seqs) == 1 else f"{len(self.seqs)} streams"
        return f"{which} of VM {self.vm}"


@dataclass
class Generator:
    """One side of a flow: its ends, and for each of them the cycle of frames that it sends or expects."""

    ends: list[End] = field(default_factory=list)
    _cycles: list[bytes] = field(default_factory=list)

    def prepare(self, payload: int, frames: int) -> None:
        """Make the cycles in advance, so that this is no part of the time that is measured."""
        self._cycles = [cycle_of(end.vm, end.seqs, payload, frames) for end in self.ends]

    def send(self, cycles: int) -> float:
        """Send the cycle of every end `cycles` times; returns when that began (`time.monotonic`)."""
        begun = time.monotonic()
        outlets = [_Outlet(end, cycle, cycles) for end, cycle in zip(self.ends, self._cycles, strict=True)]
        with select.epoll() as epoll:
            by_fd = {}
            for outlet in outlets:
                outlet.end.sock.setblocking(False)
                by_fd[outlet.end.sock.fileno()] = outlet
                epoll.register(outlet.end.sock, select.EPOLLOUT)
            while by_fd:
                events = epoll.poll(PATIENCE)
                if not events:
                    raise _stalled(outlet.end for outlet in by_fd.values())
                for fd, _ in events:
                    if not by_fd[fd].send():
                        epoll.unregister(fd)
                        del by_fd[fd]
        return begun

    def receive(self, cycles: int) -> float:
        """Receive the cycle of every end `cycles` times, and nothing else; returns when that was done."""
        buffer = bytearray(BUFFER_SIZE)
        view = memoryview(buffer)
        with select.epoll() as epoll:
            by_fd = {}
            for end, cycle in zip(self.ends, self._cycles, strict=True):
                end.sock.setblocking(False)
                if cycles:
                    by_fd[end.sock.fileno()] = end, StreamCheck(end.name, cycle, cycles)
                    epoll.register(end.sock, select.EPOLLIN)
            while by_fd:
                events = epoll.poll(PATIENCE)
                if not events:
                    raise _stalled(end for end, _ in by_fd.values())
                for fd, _ in events:
                    end, check = by_fd[fd]
                    size = end.sock.recv_into(buffer, check.read_size)
                    if not size:
                        raise StalledError(f"{end.name}: hung up before everything had come")
                    check.take(view[:size])
                    if not check.left:
                        epoll.unregister(fd)
                        del by_fd[fd]
        ended = time.monotonic()
        for end in self.ends:
            expect_silence(end)
        return ended

    def close_ends(self) -> None:
        for end in self.ends:
            end.sock.close()
        self.ends.clear()
        self._cycles.clear()


class _Outlet:
    """What one end still has to send."""

    def __init__(self, end: End, cycle: bytes, cycles: int) -> None:
        self.end = end
        self._period = len(cycle)
        self._left = len(cycle) * cycles
        self._at = 0
        self._view = memoryview(repeated(cycle, BUFFER_SIZE))

    def send(self) -> int:
        """Send what the socket takes now; returns how much is left."""
        size = min(self._left, BUFFER_SIZE)
        sent = self.end.sock.send(self._view[self._at : self._at + size])
        self._at = (self._at + sent) % self._period
        self._left -= sent
        return self._left


def _stalled(ends: Iterable[End]) -> StalledError:
    names = [end.name for end in ends]
    return StalledError(f"nothing moved for {PATIENCE:.0f} s; waiting for {len(names)}, first {names[0]}")


def expect_silence(end: End) -> None:
    """Check that nothing came after what was sent. Raises `WrongBytesError`."""
    try:
        more = end.sock.recv(4096, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    raise WrongBytesError(
        f"{end.name}: {len(more)} bytes came that nobody sent" if more else f"{end.name}: closed"
    )


def make_blocking(sock: socket.socket) -> socket.socket:
    """Make reads and writes wait for `PATIENCE` seconds at most; returns the socket.

    Each of them stays a single system call: a timeout of the socket module would add a `poll` to it.
    """
    sock.setblocking(True)
    limit_receive(sock, PATIENCE)
    limit_send(sock, PATIENCE)
    return sock


def receive_some(sock: socket.socket, size: int = BUFFER_SIZE) -> bytes:
    """Read once from a socket that `make_blocking` has prepared. Raises `StalledError`."""
    try:
        data = sock.recv(size)
    except BlockingIOError:
        raise StalledError(f"nothing came for {PATIENCE:.0f} s") from None
    if not data:
        raise StalledError("hung up in the middle")
    return data


def receive_into(sock: socket.socket, view: memoryview) -> int:
    """Do the same as `receive_some`, but into a buffer; returns how many bytes came."""
    try:
        size = sock.recv_into(view)
    except BlockingIOError:
        raise StalledError(f"nothing came for {PATIENCE:.0f} s") from None
    if not size:
        raise StalledError("hung up in the middle")
    return size
