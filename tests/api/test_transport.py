"""Whole messages over sockets: pieces, ends in the middle, deadlines."""

from __future__ import annotations

import contextlib
import socket
import threading
import tracemalloc
from collections.abc import Iterator

import pytest

from cc_proxy.api import ProtocolError, Request, Response, TimedOut, read_message, write_message
from cc_proxy.api.messages import MemberError
from cc_proxy.api.transport import limit_receive
from tests.api.support import Grudging, expect, expect_end, message, peer, splits

MIB = 1_048_576

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def fill(sock: socket.socket) -> None:
    """Writes until nothing more is taken."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while sock.send(bytes(65_536)):
            pass
    sock.setblocking(True)


# Reading ----------------------------------------------------------------------------------------------------


def test_messages_one_after_the_other_and_not_a_byte_too_many(pair: Pair) -> None:
    near, far = pair
    far.sendall(message(b'{"id":"a"}') + message(b"{}") + message(b'{"id":"b"}') + b"F")
    assert read_message(near, Request, timeout=0) == Request("a")
    assert read_message(near, Request, timeout=0) == Request("")
    assert read_message(near, Request, timeout=0) == Request("b")
    assert near.recv(100) == b"F"


def test_a_message_in_every_two_pieces(pair: Pair) -> None:
    """The second piece is sent when the first was read and nothing more was there."""
    near, far = pair
    stream = message(b'{"id":"a"}')

    class InPieces(Grudging):
        def recv(self, size: int, flags: int = 0, /) -> bytes:
            try:
                return socket.socket.recv(self, size, flags)
            finally:
                if pieces:
                    far.sendall(pieces.pop(0))

    with InPieces.of(near) as slow:
        for pieces in splits(stream):
            far.sendall(pieces.pop(0))
            assert read_message(slow, Request, timeout=10) == Request("a")
            assert not pieces


def test_a_byte_at_a_time_and_now_and_then_nothing(pair: Pair) -> None:
    near, far = pair
    with Grudging.of(near) as slow:
        far.sendall(message(b'{"id":"a"}') + message(b'{"id":"b"}'))
        assert read_message(slow, Request, timeout=10) == Request("a")
        assert read_message(slow, Request) == Request("b")


@pytest.mark.parametrize("mode", [None, 0.0, 3.0])
def test_sockets_may_be_blocking_or_not_and_stay_so(pair: Pair, mode: float | None) -> None:
    for sock in pair:
        sock.settimeout(mode)
    write_message(pair[0], Request("a"), timeout=1)
    assert read_message(pair[1], Request, timeout=1) == Request("a")
    with pytest.raises(TimedOut):
        read_message(pair[1], Request, timeout=0)
    assert [sock.gettimeout() for sock in pair] == [mode, mode]


def test_an_end_between_messages_is_none(pair: Pair) -> None:
    near, far = pair
    far.sendall(message(b"{}"))
    far.close()
    assert read_message(near, Request) == Request()
    assert read_message(near, Request) is None
    assert read_message(near, Request, timeout=0) is None


def test_an_end_inside_a_message_is_an_error() -> None:
    stream = message(b'{"id":"a"}')
    for held in range(1, len(stream)):
        near, far = socket.socketpair()
        with near, far:
            far.sendall(stream[:held])
            far.close()
            with pytest.raises(ProtocolError, match="closed"):
                read_message(near, Request, timeout=0)


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(message(b"{}", length=MIB + 1), id="1 MiB and a byte"),
        pytest.param(message(b"{}", length=2**32 - 1), id="4 GiB"),
        pytest.param(message(b"{}", reserved=1), id="reserved"),
        pytest.param(message(b"{}", reserved=2**31), id="reserved, first bit"),
        pytest.param(message(b""), id="nothing"),
        pytest.param(message(b"[]"), id="array"),
        pytest.param(message(b"null"), id="null"),
        pytest.param(message(b"{}\0"), id="NUL"),
        pytest.param(message(b'{"id":"\xff"}'), id="no UTF-8"),
        pytest.param(message(b"[" * 200_000), id="200,000 brackets"),
    ],
)
def test_what_is_no_message_is_an_error_at_once(stream: bytes) -> None:
    def script(far: socket.socket) -> None:
        far.sendall(stream)
        expect_end(far)

    with peer(script) as near, pytest.raises(ProtocolError):
        read_message(near, Request, timeout=10)


def test_an_object_of_another_kind_is_an_error_that_names_the_member(pair: Pair) -> None:
    pair[1].sendall(message(b'{"id":5}'))
    with pytest.raises(MemberError, match="id"):
        read_message(pair[0], Request, timeout=0)


def test_a_text_of_1_mib() -> None:
    text = b'{"id":"' + b"x" * (MIB - 9) + b'"}'
    with peer(lambda far: far.sendall(message(text))) as near:
        assert read_message(near, Request, timeout=10) == Request("x" * (MIB - 9))


def test_an_announced_length_allocates_little(pair: Pair) -> None:
    near, far = pair
    far.sendall(message(b"{", length=MIB))
    tracemalloc.start()
    try:
        with pytest.raises(TimedOut):
            read_message(near, Request, timeout=0)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


# Writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_header_and_text_go_out_in_one_write(size: int) -> None:
    """There is a client that reads the header at once or not at all."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        write_message(near, Response(False, "x" * size))
        near.send(b"behind")
        error = b',"error":"' + b"x" * size + b'"' if size else b""
        assert far.recv(200_000) == message(b'{"success":false' + error + b"}")
        assert far.recv(200_000) == b"behind"


def test_a_byte_is_taken_at_a_time_and_now_and_then_none(pair: Pair) -> None:
    near, far = pair
    with Grudging.of(near) as slow:
        write_message(slow, Request("a"), timeout=10)
        write_message(slow, Request("b"))
        expect(far, message(b'{"id":"a"}') + message(b'{"id":"b"}'))


def test_a_long_message_to_a_peer_that_takes_it_slowly() -> None:
    text = b'{"id":"' + b"x" * (MIB - 9) + b'"}'

    def script(far: socket.socket) -> None:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        expect(far, message(text))
        expect_end(far)

    with peer(script) as near:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        write_message(near, Request("x" * (MIB - 9)), timeout=10)


def test_a_message_over_1_mib_is_refused_and_nothing_of_it_sent(pair: Pair) -> None:
    near, far = pair
    with pytest.raises(ProtocolError, match="1048577"):
        write_message(near, Request("x" * (MIB - 8)))
    near.close()
    expect_end(far)


def test_nobody_to_write_to(pair: Pair) -> None:
    near, far = pair
    far.close()
    with pytest.raises(BrokenPipeError):
        write_message(near, Request("a"))


def test_a_peer_that_goes_away_while_it_is_written_to() -> None:
    with (
        peer(lambda far: far.recv(1_000)) as near,
        pytest.raises(OSError, match=r"Broken pipe|Connection reset"),
    ):
        write_message(near, Request("x" * 1_000_000), timeout=10)


# Deadlines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.0, -1, 0.01])
def test_a_message_that_is_not_whole_in_time(timeout: float) -> None:
    for held in (0, 1, 7, 8, 9, 17):
        near, far = socket.socketpair()
        with near, far:
            far.sendall(message(b'{"id":"a"}')[:held])
            with pytest.raises(TimedOut, match="message"):
                read_message(near, Request, timeout=timeout)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, 0.01])
def test_a_message_that_is_not_taken_in_time(pair: Pair, timeout: float) -> None:
    near, _ = pair
    fill(near)
    with pytest.raises(TimedOut, match="message"):
        write_message(near, Request("a"), timeout=timeout)


def test_a_message_of_which_part_is_taken_in_time(pair: Pair) -> None:
    near, far = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    with pytest.raises(TimedOut, match="message"):
        write_message(near, Request("x" * 1_000_000), timeout=0)
    expect(far, message(b"", length=1_000_009) + b'{"id":"xxx')


def test_the_deadline_is_for_all_of_a_message_and_not_for_each_piece() -> None:
    """A byte every 20 ms would keep a deadline of 100 ms alive for a second."""

    def script(far: socket.socket) -> None:
        pause = threading.Event()
        for byte in message(b" " * 42 + b"{}"):
            try:
                far.send(bytes([byte]))
            except BrokenPipeError:
                return
            pause.wait(0.02)

    with peer(script) as near, pytest.raises(TimedOut):
        read_message(near, Request, timeout=0.1)


@pytest.mark.parametrize("timeout", [86_400.0, 1e7, 1e300, float("inf")])
def test_no_deadline_is_too_far_away(pair: Pair, timeout: float) -> None:
    near, far = pair
    with Grudging.of(far) as slow:
        write_message(slow, Request("a"), timeout=timeout)
    assert read_message(near, Request, timeout=timeout) == Request("a")


def test_timed_out_is_a_timeout_error(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        read_message(pair[0], Request, timeout=0)


@pytest.mark.parametrize("timeout", [None, 0, 1])
def test_a_closed_socket_is_an_os_error(pair: Pair, timeout: float | None) -> None:
    near, _ = pair
    near.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_message(near, Request("a"), timeout=timeout)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_message(near, Request, timeout=timeout)


@pytest.mark.parametrize("seconds", [1e-6, 9e-7, 1e-7])
def test_a_moment_is_not_for_ever(seconds: float) -> None:
    """To the kernel a timeout of 0 is none at all."""
    near, far = socket.socketpair()
    with near, far:
        limit_receive(near, seconds)
        with pytest.raises(BlockingIOError):
            near.recv(1)
