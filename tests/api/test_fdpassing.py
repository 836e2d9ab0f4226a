"""An fd and its byte: what goes out, and that nothing of what should not have come stays open."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from cc_proxy.api import ProtocolError, Response, TimedOut, read_fd, read_message, write_fd, write_message

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its first end sees end of file as soon as nobody has the second any more."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    if not closed(writer):
        os.close(writer)


def closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def is_end_of_file(reader: int) -> bool:
    """Whether no copy of the pipe's writing end is left, be it open or on its way."""
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


@contextlib.contextmanager
def fds_left(count: int) -> Iterator[None]:
    """So many fds may still be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.dup(0) for _ in range(count + 1)]
    for fd in held:
        os.close(fd)
    # The kernel gives the lowest that is free: these come next, and the limit is the first one too many.
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_fd_travels_with_one_byte_f_in_a_send_of_its_own() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        write_fd(near, far.fileno())
        near.send(b"behind")
        data, ancillary, flags, _ = far.recvmsg(100, 1_000)
        [(level, kind, rights)] = ancillary
        fds = array.array("i", rights)
        for fd in fds:
            os.close(fd)
        assert data == b"F"
        assert (level, kind, len(fds)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 1)
        assert not flags & socket.MSG_CTRUNC
        assert far.recv(100) == b"behind"


def test_what_arrives_is_the_same_file(pair: Pair, pipe: tuple[int, int]) -> None:
    near, far = pair
    reader, writer = pipe
    write_fd(far, writer)
    assert not closed(writer)
    fd = read_fd(near)
    try:
        assert fd != writer
        assert not os.get_inheritable(fd)
        os.write(fd, b"x")
        assert os.read(reader, 10) == b"x"
    finally:
        os.close(fd)


def test_fds_and_messages_stay_in_their_order(pair: Pair, pipe: tuple[int, int]) -> None:
    """All of it is there at once: a read that went too far would take an fd along and lose it."""
    near, far = pair
    for error in ("one", "two"):
        write_message(far, Response(False, error))
        write_fd(far, pipe[1])
        write_fd(far, pipe[1])
    far.sendall(b"rest")
    for error in ("one", "two"):
        assert read_message(near, Response, timeout=0) == Response(False, error)
        os.close(read_fd(near, timeout=0))
        os.close(read_fd(near, timeout=0))
    assert near.recv(100) == b"rest"


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_sockets_may_be_blocking_or_not_and_stay_so(
    pair: Pair, pipe: tuple[int, int], timeout: float | None
) -> None:
    for mode in (None, 0.0, 3.0):
        for sock in pair:
            sock.settimeout(mode)
        write_fd(pair[1], pipe[1], timeout=timeout)
        os.close(read_fd(pair[0], timeout=timeout))
        assert [sock.gettimeout() for sock in pair] == [mode, mode]


# What must not come -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "count"),
    [
        pytest.param(b"F", 0, id="no fd"),
        pytest.param(b"G", 0, id="another byte"),
        pytest.param(b"\0", 0, id="NUL"),
        pytest.param(b"f", 1, id="an fd with another byte"),
        pytest.param(b"\0", 1, id="an fd with NUL"),
        pytest.param(b"F", 2, id="two fds"),
        pytest.param(b"F", 3, id="three fds"),
        pytest.param(b"F", 50, id="50 fds"),
        pytest.param(b"F", 253, id="253 fds"),
        pytest.param(b"x", 2, id="two fds with another byte"),
    ],
)
def test_anything_but_one_f_with_one_fd_is_refused_and_closed(
    pair: Pair, pipe: tuple[int, int], data: bytes, count: int
) -> None:
    near, far = pair
    reader, writer = pipe
    if count:
        socket.send_fds(far, [data], [writer] * count)
    else:
        far.sendall(data)
    with pytest.raises(ProtocolError):
        read_fd(near, timeout=0)
    os.close(writer)
    assert is_end_of_file(reader)


def test_fds_of_two_sends_are_not_taken_together(pair: Pair, pipe: tuple[int, int]) -> None:
    near, far = pair
    for _ in range(2):
        socket.send_fds(far, [b"F"], [pipe[1]])
    os.close(read_fd(near, timeout=0))
    os.close(read_fd(near, timeout=0))


def test_what_follows_the_byte_in_the_same_send_is_left(pair: Pair, pipe: tuple[int, int]) -> None:
    near, far = pair
    socket.send_fds(far, [b"Fxyz"], [pipe[1]])
    os.close(read_fd(near, timeout=0))
    assert near.recv(10) == b"xyz"


@pytest.mark.parametrize(("room", "count"), [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
def test_fds_for_which_there_was_no_room_are_an_error(
    pair: Pair, pipe: tuple[int, int], room: int, count: int
) -> None:
    """Of two fds, one arrives: it looks right but for a flag."""
    near, far = pair
    reader, writer = pipe
    socket.send_fds(far, [b"F"], [writer] * count)
    with fds_left(room), pytest.raises((ProtocolError, OSError)):
        read_fd(near, timeout=0)
    os.close(writer)
    assert is_end_of_file(reader)


def test_an_end_where_an_fd_should_have_come(pair: Pair) -> None:
    near, far = pair
    far.close()
    with pytest.raises(ProtocolError, match="closed"):
        read_fd(near, timeout=0)


# Deadlines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.0, 0.01, -1])
def test_an_fd_that_does_not_come_in_time(pair: Pair, timeout: float) -> None:
    with pytest.raises(TimedOut, match="fd"):
        read_fd(pair[0], timeout=timeout)


@pytest.mark.parametrize("timeout", [0, 0.0, 0.01, -1])
def test_an_fd_that_is_not_taken_in_time(pair: Pair, pipe: tuple[int, int], timeout: float) -> None:
    near, _ = pair
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while near.send(bytes(65_536)):
            pass
    near.setblocking(True)
    reader, writer = pipe
    with pytest.raises(TimedOut, match="fd"):
        write_fd(near, writer, timeout=timeout)
    os.close(writer)
    assert is_end_of_file(reader)


def test_nobody_to_send_an_fd_to(pair: Pair, pipe: tuple[int, int]) -> None:
    near, far = pair
    far.close()
    with pytest.raises(BrokenPipeError):
        write_fd(near, pipe[1])


def test_a_closed_fd_cannot_be_sent(pair: Pair, pipe: tuple[int, int]) -> None:
    near, far = pair
    os.close(pipe[1])
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_fd(near, pipe[1])
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
