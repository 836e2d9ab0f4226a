"""One client's connection: its messages, how long they take, and what it does wrong."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import tracemalloc
from pathlib import Path

import pytest

from cc_proxy.continuity.cells import AT_PHASE, Phase
from cc_proxy.linux.credentials import Credentials
from cc_proxy.proxy.clients.connection import Connection
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers
from cc_proxy.proxy.rest import Rest
from cc_proxy.proxy.spin import Spin
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import Limits, LiveSettings, Settings
from tests.connector import CONNECTOR
from tests.proxy.conftest import Logged
from tests.proxy.house import LONG, UNKNOWN, Answering, House, limited
from tests.proxy.support import CellKeeper, new_user, read_now, read_to_end
from tests.wire.support import (
    WAIT,
    RawClient,
    at_end,
    is_silent,
    message,
    refused,
    request,
    unread_by_peer,
    wait_until,
)

# Messages -------------------------------------------------------------------------------------------------


def test_responses_are_written_whole(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("long") * 3)
    for _ in range(3):
        assert client.receive() == LONG


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_kernel_that_is_short_of_memory_costs_no_response_and_no_fd(
    house: House, answering: Answering, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failures = ["send", "send", "sendmsg", "sendmsg"]

    def fail_at_first(name: str) -> None:
        call = getattr(socket.socket, name)

        def attempt(sock: socket.socket, *arguments: object) -> object:
            if sock is not client.sock and name in failures:
                failures.remove(name)
                raise OSError(number, os.strerror(number))
            return call(sock, *arguments)

        monkeypatch.setattr(socket.socket, name, attempt)

    client = house.connect()
    fail_at_first("send")
    fail_at_first("sendmsg")
    client.send(message("fd"))
    assert client.receive() == b"here it is"
    assert at_end(client.receive_fd(1).sock)
    assert not failures
    wait_until(lambda: answering.passed[0].fileno() == -1, "the daemon has closed it")
    client.close_all()


def test_silent_clients_have_no_thread(house: House) -> None:
    before = threading.active_count()
    clients = [house.connect() for _ in range(50)]
    for _ in range(3):
        assert [client.ask("x") for client in clients] == [UNKNOWN] * 50
    assert threading.active_count() == before


@pytest.mark.parametrize("text", [b"wait", b"x" * 1_000], ids=["what may wait", "a long message"])
def test_what_may_take_time_has_a_thread_and_holds_up_nobody(
    house: House, answering: Answering, text: bytes
) -> None:
    """And the connection is parked again after that."""
    before = threading.active_count()
    slow, other = house.connect(), house.connect()
    data = message(text)
    slow.send(data[:500])
    other.send(message("x"))
    assert other.receive() == b"answer"
    wait_until(lambda: threading.active_count() == before + 1, "it has a thread")
    slow.send(data[500:])
    answering.proceed.set()
    assert slow.receive() == b"answer"
    wait_until(lambda: threading.active_count() == before, "it has none any more")
    slow.send(message("x"))
    assert slow.receive() == b"answer"


def test_requests_behind_one_that_waits_are_answered_after_it(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("x") + message("wait") + message("x") * 3)
    assert client.receive() == b"answer"
    assert is_silent(client.sock)
    answering.proceed.set()
    for _ in range(4):
        assert client.receive() == b"answer"


def test_it_is_known_whether_a_client_still_waits(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("wait"))
    wait_until(lambda: answering.asker is not None, "it is being answered")
    assert answering.asker
    assert answering.asker.is_here()
    client.sock.shutdown(socket.SHUT_WR)
    assert answering.asker.is_here(), "it may still read the answer"
    client.close()
    assert not answering.asker.is_here()
    answering.proceed.set()


def test_silent_client_takes_no_memory_for_what_it_has_asked(house: House, answering: Answering) -> None:
    """Neither for the request, which may have had a megabyte, nor for the response."""
    clients = [house.connect() for _ in range(10)]
    ask = message(b"long" + b" " * 500_000)
    tracemalloc.start()
    try:
        for client in clients:
            client.send(ask)
            assert client.receive() == LONG
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < 1_000_000, "all of it is given back")
    finally:
        tracemalloc.stop()


def test_long_responses_that_nobody_takes_are_limited(tmp_sock_dir: Path, answering: Answering) -> None:
    size = 8 + len(LONG)
    answering.proceed.set()
    with limited(tmp_sock_dir, Limits(request_bytes=1_500_000)) as house:

        def answer_to(client: RawClient) -> bytes:
            client.send(message("wait, long"))
            return client.receive()

        def counted() -> int:
            return house.has("request_bytes")

        slow, other = house.connect(), house.connect()
        slow.send(message("wait, long"))
        wait_until(lambda: counted() == size, "it is on its way")
        assert answer_to(other) == refused(
            f"it was carried out, but its response of {size} bytes cannot be sent: "
            "the limit of 1500000 bytes of ids, and of messages that are on their way is reached"
        )
        assert slow.receive() == LONG
        wait_until(lambda: counted() == 0, "it is given back")
        assert answer_to(other) == LONG
        wait_until(lambda: counted() == 0, "it is given back")
        slow.send(message("wait, long"))
        wait_until(lambda: counted() == size, "it is on its way")
        slow.close()
        wait_until(lambda: counted() == 0, "it is given back though nobody took it")


def test_long_request_counts_from_its_beginning_until_it_is_answered(
    house: House, answering: Answering
) -> None:
    client = house.connect()
    data = message(b"x" * 100_000)
    client.send(data[:10])
    wait_until(lambda: 90_000 < house.has("request_bytes") < len(data), "what is to come counts")
    client.send(data[10:])
    assert client.receive() == b"answer"
    wait_until(lambda: not house.has("request_bytes"), "it is given back")


def test_long_request_that_is_left_unfinished_is_given_back(house: House, logged: Logged) -> None:
    client = house.connect()
    client.send(message(b"x" * 100_000)[:10])
    wait_until(lambda: house.has("request_bytes") > 0, "it counts")
    client.close()
    wait_until(lambda: not house.has("connections"), "the connection is forgotten")
    assert not house.has("request_bytes")
    assert logged.fields("client disconnected") == [{"client": 1, "reason": "closed by the client"}]


def test_request_beyond_the_limit_is_refused_with_its_connection(tmp_sock_dir: Path) -> None:
    """And its client reads why, though it goes on writing."""
    with limited(tmp_sock_dir, Limits(request_bytes=150_000)) as house:
        first, beyond = house.connect(), house.connect()
        first.send(message(b"{}" + b" " * 100_000)[:10])
        wait_until(lambda: house.has("request_bytes") > 0, "it counts")
        data = message(b"{}" + b" " * 100_000)
        beyond.send(data[:50_000])
        assert beyond.receive() == refused(
            "the limit of 150000 bytes of ids, and of messages that are on their way is reached"
        )
        assert at_end(beyond.sock)
        assert house.has("connections") == 2
        beyond.send(data[50_000:])
        wait_until(lambda: house.has("connections") == 1, "the rest is thrown away")
        first.close()
        wait_until(lambda: not house.has("request_bytes"), "there is room again")
        again = house.connect()
        again.send(data)
        assert again.receive() == refused("no 'id' field in request")


# Fds that are passed --------------------------------------------------------------------------------------


def test_fd_that_was_passed_is_closed_here(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("fd") + message("x"))
    assert client.receive() == b"here it is"
    stream = client.receive_fd(1)
    assert client.receive() == b"answer"
    assert answering.passed[0].fileno() == -1
    assert at_end(stream.sock)
    client.close_all()


def test_fd_goes_out_behind_its_response_however_late_that_is_taken(
    house: House, answering: Answering
) -> None:
    """More than fits at once, so that a worker sends the rest."""
    client, other = house.connect(), house.connect()
    client.send(message("long, fd"))
    wait_until(lambda: not is_silent(client.sock), "it is being sent")
    other.send(message("x"))
    assert other.receive() == b"answer", "nobody waits for that"
    assert client.receive() == LONG
    assert at_end(client.receive_fd(1).sock)
    wait_until(lambda: answering.passed[0].fileno() == -1, "it is closed here")
    client.close_all()


@pytest.mark.parametrize("before", [0, 1])
def test_each_fd_has_its_place_though_its_client_is_slow(
    house: House, answering: Answering, before: int
) -> None:
    """More than fits: where it does not go on is in front of an fd, or in front of a response."""
    client = house.connect()
    client.send(message("x") * before + message("fd") * 300)
    wait_until(lambda: bool(answering.passed), "it has begun")
    answered = 0
    while answered != len(answering.passed):  # until no more fits
        answered = len(answering.passed)
        threading.Event().wait(0.03)
    for _ in range(before):
        assert client.receive() == b"answer"
    for _ in range(300):
        assert client.receive() == b"here it is"
        stream = client.receive_fd(1)
        assert at_end(stream.sock)
        stream.close()
    client.send(message("x"))
    assert client.receive() == b"answer"
    assert all(sock.fileno() == -1 for sock in answering.passed)


@pytest.mark.parametrize("before", [0, 1])
def test_fd_that_is_not_taken_in_time_is_closed_with_its_connection(
    tmp_sock_dir: Path, answering: Answering, logged: Logged, before: int
) -> None:
    with limited(tmp_sock_dir, Limits(message_timeout=0.05)) as house:
        client = house.connect()
        client.send(message("x") * before + message("fd") * 300)
        wait_until(lambda: bool(logged.fields("client disconnected")), "it is let go")
        assert logged.fields("client disconnected") == [{"client": 1, "reason": "Connection timed out"}]
        assert all(sock.fileno() == -1 for sock in answering.passed)


def test_fd_for_a_client_that_has_gone_is_closed(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("wait") + message("fd") + message("fd"))
    client.close()
    answering.proceed.set()
    wait_until(lambda: not house.has("connections"), "it is forgotten")
    assert all(sock.fileno() == -1 for sock in answering.passed)


# Time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1, 7, 8, 12])
def test_message_that_does_not_go_on_ends_its_connection(
    tmp_sock_dir: Path, logged: Logged, part: int
) -> None:
    with limited(tmp_sock_dir, Limits(message_timeout=0.05)) as house:
        idle = house.connect()
        assert idle.ask("x") == UNKNOWN
        client = house.connect()
        client.send(request("x") + request("x")[:part])
        assert client.receive() == UNKNOWN
        assert at_end(client.sock)
        who = {"client": 2, "pid": os.getpid(), "uid": os.getuid()}
        assert logged.fields("client broke the protocol") == [
            who | {"error": "a message that had begun did not arrive in time"}
        ]
        assert idle.ask("x") == UNKNOWN, "between messages there is no hurry"


def test_message_that_comes_a_byte_at_a_time_has_as_much_time_as_any(tmp_sock_dir: Path) -> None:
    """Its time is not begun anew with each byte."""
    with limited(tmp_sock_dir, Limits(message_timeout=0.2)) as house:
        client = house.connect()
        never = threading.Event()
        data = message(" " * 5_000)
        sent = 0
        while sent < len(data):
            try:
                client.send(data[sent : sent + 1])
            except BrokenPipeError:
                break
            sent += 1
            never.wait(0.005)
            if not is_silent(client.sock):
                break
        assert 10 < sent < 1_000
        assert at_end(client.sock)


def test_slow_message_in_time_is_answered_and_the_next_one_has_its_own(tmp_sock_dir: Path) -> None:
    with limited(tmp_sock_dir, Limits(message_timeout=2)) as house:
        client = house.connect()
        for _ in range(3):
            data = request("x")
            for at in range(0, len(data), 5):
                client.send(data[at : at + 5])
            assert client.receive() == UNKNOWN
        assert client.ask("x") == UNKNOWN


def test_client_that_does_not_take_its_responses_is_let_go_in_time(
    tmp_sock_dir: Path, logged: Logged
) -> None:
    with limited(tmp_sock_dir, Limits(message_timeout=0.05)) as house:
        client = house.connect()
        client.sock.setblocking(False)
        data = request("x") * 1_000
        rest = memoryview(data)
        while True:
            _, writable, _ = select.select([], [client.sock], [], WAIT)
            assert writable
            try:
                rest = rest[client.sock.send(rest) :] or memoryview(data)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                if not house.has("connections"):
                    break
        fields = logged.fields("client disconnected")
        assert fields == [{"client": 1, "reason": "Connection timed out"}]


# Errors ---------------------------------------------------------------------------------------------------


def test_error_that_nobody_expects_costs_its_connection_alone(
    house: House, answering: Answering, logged: Logged
) -> None:
    other, client = house.connect(), house.connect()
    other.send(message("x"))
    assert other.receive() == b"answer"
    client.send(message("x") + message("error") + message("never"))
    assert client.receive() == b"answer"
    assert at_end(client.sock)
    other.send(message("x"))
    assert other.receive() == b"answer"
    assert logged.fields("connection failed") == [{"client": 2}]
    assert logged.at(logging.ERROR) == ["connection failed"]
    assert house.has("connections") == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (message("[]"), "not a JSON object"),
        (message("{}", length=2**20 + 1), "a message announces 1048577 bytes"),
        (message("{}", reserved=1), "the reserved field"),
    ],
)
def test_broken_protocol_is_logged_with_its_reason(
    house: House, logged: Logged, data: bytes, reason: str
) -> None:
    client = house.connect()
    client.send(data)
    assert read_to_end(client.sock) == b""
    wait_until(lambda: bool(logged.fields("client disconnected")), "it is noticed")
    (fields,) = logged.fields("client broke the protocol")
    assert str(fields["error"]).startswith(reason)
    (connected,) = logged.fields("client connected")
    assert connected == {"client": 1, "pid": os.getpid(), "uid": os.getuid()}


def test_empty_message_in_pieces_breaks_the_protocol_as_a_whole_one_does(
    house: House, logged: Logged
) -> None:
    """It is no end of file."""
    client = house.connect()
    client.send(message("")[:3])
    wait_until(lambda: unread_by_peer(client.sock) == 0, "the first piece is read")
    client.send(message("")[3:])
    assert at_end(client.sock)
    (fields,) = logged.fields("client broke the protocol")
    assert str(fields["error"]).startswith("not a JSON object")


def test_client_that_is_silent_is_at_no_moment_taken_for_one_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it gets an answer that it has not asked for, if the process is killed at that moment."""
    phases: list[int] = []

    class Watched(socket.socket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            phases.append(keeper.cells[0][AT_PHASE])
            try:
                return super().recv(size, flags)
            finally:
                phases.append(keeper.cells[0][AT_PHASE])

    keeper, live = CellKeeper(), LiveSettings(Settings())
    near, far = socket.socketpair()
    with Watched(fileno=near.detach()) as sock, far:
        handlers = Handlers(Registry(live, CONNECTOR, str(tmp_path / "sock")), live, None, keeper)
        client = ClientInfo(1, Credentials.own(), new_user())
        connection = Connection(sock, client, handlers, live, Rest())
        connection.keep()
        with monkeypatch.context() as patch:
            patch.setattr(Spin, "wait", lambda _spin, look, _sleep: look())
            assert connection.converse(), "it is looked for a moment whether more comes"
        assert set(phases) == {Phase.SILENT}
        far.sendall(request("x"))
        assert connection.on_readable()
        assert phases[-1] == Phase.READING
        assert read_now(far)
        connection.end("over")
