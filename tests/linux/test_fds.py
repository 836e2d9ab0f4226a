"""Closing streams, sending pieces without copying them, and the limit of open files."""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from cc_proxy.linux.fds import (
    Piece,
    close_stream,
    cut,
    holds_fds,
    may_hold_fds,
    raise_fd_limit,
    refuse_rights,
    send_pieces,
    taken_whole,
    untaken,
)
from cc_proxy.linux.fds import unread as unread_of
from tests.proxy.support import open_fds
from tests.wire.support import WAIT, at_end

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.settimeout(WAIT)
    with near, far:
        yield near, far


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece
        data += piece
    return data


def test_the_soft_limit_becomes_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        assert raise_fd_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("unread", [0, 1, 200_000])
def test_who_is_closed_reads_what_was_sent_and_then_the_end(ends: Ends, unread: int) -> None:
    near, far = ends
    near.setblocking(True)
    near.sendall(b"the last words")
    if unread:
        far.setblocking(False)
        far.send(bytes(unread))
        far.settimeout(WAIT)
    near.setblocking(False)
    close_stream(near)
    assert near.fileno() == -1
    assert receive(far, 14) == b"the last words"
    assert at_end(far)


def test_who_is_closed_sees_the_end_though_somebody_else_holds_the_fd(ends: Ends) -> None:
    near, far = ends
    with near.dup():
        close_stream(near)
        assert at_end(far)


def test_who_has_hung_up_or_is_closed_already_is_no_error(ends: Ends) -> None:
    near, far = ends
    far.send(b"x")
    far.close()
    close_stream(near)
    assert near.fileno() == -1
    close_stream(near)


@pytest.mark.parametrize("count", [0, 1, 2, 1_023, 1_024, 1_025, 5_000])
def test_pieces_arrive_one_behind_the_other(ends: Ends, count: int) -> None:
    near, far = ends
    data = random.Random(count).randbytes(count * 2)
    pieces = [memoryview(data)[at : at + 2] for at in range(0, len(data), 2)]
    assert not send_pieces(near, pieces)
    assert receive(far, len(data)) == data


def test_what_a_socket_does_not_take_comes_back_uncopied(ends: Ends) -> None:
    near, far = ends
    rng = random.Random(4)
    buffer = bytearray(rng.randbytes(3_000_000))
    view = memoryview(buffer)
    pieces: list[Piece] = []
    at = 0
    while at < len(buffer):
        size = rng.randrange(1, 2_000)
        pieces.append(view[at : at + size])
        at += size
    received = b""
    rest = send_pieces(near, pieces)
    assert rest
    assert all(isinstance(piece, memoryview) and piece.obj is buffer for piece in rest)
    while True:
        left = sum(map(len, rest))
        received += receive(far, len(buffer) - left - len(received))
        if not rest:
            break
        rest = send_pieces(near, rest)
    assert received == buffer


@pytest.mark.parametrize("buffer", [4_608, 30_000, 262_144])
def test_what_is_taken_whole_is_taken_whole_or_not_at_all(ends: Ends, buffer: int) -> None:
    near, far = ends
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    most = taken_whole(near)
    assert 1_000 < most <= 32_768
    rng = random.Random(buffer)
    taken = refused = 0
    for _ in range(2_000):
        size = rng.choice([1, 100, most // 2, most])
        try:
            assert near.send(bytes(size)) == size
            taken += 1
        except BlockingIOError:
            refused += 1
            far.recv(rng.randrange(1, 3 * most))
    assert taken > 100
    assert refused > 100


def test_socket_that_takes_nothing_gets_nothing(ends: Ends) -> None:
    near, _ = ends
    left = send_pieces(near, [bytes(10_000_000)])
    pieces = [b"one", b"two"]
    assert sum(map(len, left)) > 0
    assert send_pieces(near, pieces) == pieces


def test_peer_that_is_gone_is_an_error(ends: Ends) -> None:
    near, far = ends
    far.close()
    for pieces in ([b"one"], [b"one", b"two"]):
        with pytest.raises(BrokenPipeError):
            send_pieces(near, pieces)


def test_cut_is_a_slice_of_the_whole() -> None:
    rng = random.Random(5)
    for _ in range(300):
        data = rng.randbytes(rng.randrange(30))
        pieces: list[Piece] = []
        at = 0
        while at < len(data):
            size = rng.randrange(0, 6)
            pieces.append(data[at : at + size])
            at += size
        for start in range(len(data) + 2):
            assert b"".join(cut(pieces, start)) == data[start:]
            for stop in (start, start + 1, start + 3, len(data)):
                found = cut(pieces, start, stop)
                assert b"".join(found) == data[start:stop]
                assert start >= stop or all(len(piece) for piece in found)


class Kernel:
    """A socket of a kernel that has another answer to socket options."""

    def __init__(self, answer: int) -> None:
        self._answer = answer

    def setsockopt(self, *_: object) -> None:
        raise OSError(self._answer, "")

    def getsockopt(self, *_: object) -> int:
        raise OSError(self._answer, "")


def test_nobody_passes_an_fd_to_who_refuses_them(ends: Ends) -> None:
    near, far = ends
    assert may_hold_fds(near)
    refuse_rights(near)
    if may_hold_fds(near):
        pytest.skip("needs Linux 6.16")
    with pytest.raises(PermissionError):
        socket.send_fds(far, [b"x"], [0])
    far.send(b"y")
    assert receive(near, 1) == b"y"


@pytest.mark.parametrize(
    ("sent", "passed", "holds"),
    [(b"", 0, False), (b"x" * 100, 0, False), (b"x" * 100, 1, True), (b"x" * 65_536, 0, True)],
    ids=["nothing", "bytes", "an fd behind bytes", "too much to look at"],
)
def test_fds_that_were_passed_are_seen_and_left_where_they_are(
    ends: Ends, sent: bytes, passed: int, holds: bool
) -> None:
    near, far = ends
    far.sendall(sent)
    if passed:
        socket.send_fds(far, [b"y"], [far.fileno()] * passed)
    near.shutdown(socket.SHUT_RD)
    before = open_fds()
    assert holds_fds(near) == holds
    assert open_fds() == before
    if sent:
        assert receive(near, len(sent)) == sent
    if passed:
        _, fds, *_ = socket.recv_fds(near, 1, 1)
        os.close(fds[0])


def test_who_refuses_fds_may_pass_them(ends: Ends) -> None:
    near, far = ends
    refuse_rights(near)
    socket.send_fds(near, [b"x"], [near.fileno()])
    _, [passed], *_ = socket.recv_fds(far, 1, 1)
    with closing(socket.socket(fileno=passed)) as same:
        assert same.fileno() == passed


def test_kernel_that_cannot_refuse_fds_is_no_error() -> None:
    older: socket.socket = Kernel(errno.ENOPROTOOPT)  # type: ignore[assignment]
    refuse_rights(older)
    assert may_hold_fds(older)
    with pytest.raises(OSError, match="22"):
        refuse_rights(Kernel(errno.EINVAL))  # type: ignore[arg-type]


def test_what_is_on_its_way_is_known_at_both_ends(ends: Ends) -> None:
    near, far = ends
    assert (unread_of(far), untaken(near)) == (0, 0)
    near.sendall(bytes(1_000))
    assert unread_of(far) == 1_000
    assert untaken(near) >= 1_000
    far.recv(999)
    assert unread_of(far) == 1
    assert untaken(near) > 0
    far.recv(1)
    assert (unread_of(far), untaken(near)) == (0, 0)
