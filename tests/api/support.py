"""Pieces of streams, scripted peers, and sockets that give little at a time."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# What is bound to happen gets this long, in seconds. Only a test that fails waits for it.
WAIT = 10.0


def message(text: bytes, *, length: int | None = None, reserved: int = 0) -> bytes:
    """A client message; `length` is what its header claims."""
    return struct.pack(">II", len(text) if length is None else length, reserved) + text


def frame(seq: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """An I/O frame; `length` is what its header claims."""
    return struct.pack(">QI", seq, 12 + len(payload) if length is None else length) + payload


def splits(stream: bytes) -> Iterator[list[bytes]]:
    """The stream whole, a byte at a time, and in every two pieces."""
    yield [stream]
    yield [stream[at : at + 1] for at in range(len(stream))]
    for cut in range(1, len(stream)):
        yield [stream[:cut], stream[cut:]]


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this thread that `action` takes, the better of two runs."""
    taken = []
    for _ in range(2):
        begun = time.thread_time()
        action()
        taken.append(time.thread_time() - begun)
    return min(taken)


class Grudging(socket.socket):
    """A socket that moves a byte at a time, and every other time nothing, whatever poll says."""

    _again = False

    @classmethod
    def of(cls, sock: socket.socket) -> Grudging:
        return cls(fileno=sock.detach())

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self._refuse()
        return super().recv(min(size, 1), flags)

    def send(self, data: object, flags: int = 0, /) -> int:
        self._refuse()
        return super().send(memoryview(data)[:1], flags)  # type: ignore[arg-type]  # whatever a buffer is

    def _refuse(self) -> None:
        self._again = not self._again
        if self._again:
            raise BlockingIOError


@contextmanager
def peer(script: Callable[[socket.socket], object]) -> Iterator[socket.socket]:
    """One end of a socket pair; a thread has the other end, carries out `script` with it and closes it.

    On the way out this end is closed too, so that a script which reads until the end comes to one. What
    goes wrong in the script is raised here, before what may have gone wrong in the test because of it.
    """
    near, far = socket.socketpair()
    failures: list[BaseException] = []

    def run() -> None:
        with far:
            far.settimeout(WAIT)
            try:
                script(far)
            except BaseException as error:  # also what a failing assertion raises
                failures.append(error)

    thread = threading.Thread(target=run, name="peer")
    thread.start()
    try:
        with near:
            yield near
    finally:
        thread.join(WAIT)
        if failures:
            raise failures[0]
    assert not thread.is_alive()


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer if the stream ends before."""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def expect(sock: socket.socket, data: bytes) -> None:
    """The very bytes are what comes next."""
    assert read_exactly(sock, len(data)) == data


def expect_end(sock: socket.socket) -> None:
    """Nothing more comes. The peer may have left things unread."""
    try:
        assert sock.recv(1000) == b""
    except ConnectionResetError:
        return


def say(sock: socket.socket, data: bytes) -> None:
    """Sends to a peer that may have given up waiting."""
    with suppress(BrokenPipeError):
        sock.sendall(data)
