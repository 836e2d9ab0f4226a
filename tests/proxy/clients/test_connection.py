"""One client's connection: its messages, how long they take, and what it does wrong."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from cc_proxy.api import messages
from cc_proxy.api.messages import MessageParser
from cc_proxy.api.payloads import Response
from cc_proxy.proxy.clients import connection as connection_module
from cc_proxy.proxy.clients.connection import Connection
from cc_proxy.proxy.clients.handlers import Handlers, Reply
from cc_proxy.proxy.spin import Eager
from cc_proxy.proxy.users import Share
from cc_proxy.settings import Limits, UserLimits
from tests.proxy.conftest import Logged
from tests.proxy.house import UNKNOWN, Answering, House, limited
from tests.proxy.support import read_to_end
from tests.wire.support import WAIT, at_end, is_silent, message, refused, request, wait_until

# Messages -------------------------------------------------------------------------------------------------


def test_responses_are_written_whole(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    text = messages.encode(Response(False, "x" * 1_000_000))
    monkeypatch.setattr(Handlers, "answer", lambda *_: Reply(text))
    client = house.connect()
    client.send(request("x") * 3)
    for _ in range(3):
        assert len(client.receive()) == len(text) - 8


@pytest.mark.parametrize("others", [False, True])
def test_next_request_is_waited_for_eagerly_unless_other_users_are_there(
    house: House, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    waits: list[Eager] = []

    def wait(eager: Eager, look: Callable[[], object], sleep: Callable[[], object]) -> object:
        waits.append(eager)
        found = look()
        return sleep() if found is None else found

    monkeypatch.setattr(Eager, "wait", wait)
    monkeypatch.setattr(Share, "others", others)
    client = house.connect()
    for _ in range(3):
        assert client.ask("x") == UNKNOWN
    assert bool(waits) is not others


class Kept(bytes):
    """Says when it is gone."""

    gone: ClassVar[list[bytes]] = []

    def __del__(self) -> None:
        self.gone.append(bytes(self))


def test_silent_client_takes_no_memory_for_what_it_has_asked(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the request, which may have had a megabyte, nor for the response."""
    next_text = MessageParser.next_text

    def next_kept(parser: MessageParser) -> bytes | None:
        text = next_text(parser)
        return text if text is None else Kept(text)

    monkeypatch.setattr(MessageParser, "next_text", next_kept)
    monkeypatch.setattr(Handlers, "answer", lambda *_: Reply(Kept(messages.frame_text(b"answer"))))
    monkeypatch.setattr(Kept, "gone", [])
    client = house.connect()
    client.send(message("x"))
    assert client.receive() == b"answer"
    wait_until(lambda: len(Kept.gone) == 2, "both are gone")
    assert set(Kept.gone) == {b"x", messages.frame_text(b"answer")}


def test_long_responses_that_nobody_takes_are_limited(
    tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = messages.encode(Response(False, "x" * 1_000_000))
    monkeypatch.setattr(Handlers, "answer", lambda *_: Reply(long))
    with limited(tmp_sock_dir, Limits(user=UserLimits(request_bytes=1_500_000))) as house:
        share = house.server.shares.of(os.getuid())

        def counted() -> int:
            return house.server.shares.used(share.uid, "request_bytes")

        slow, other = house.connect(), house.connect()
        slow.send(message("x"))
        wait_until(lambda: counted() == len(long), "it is on its way")
        assert other.ask("x") == refused(
            f"it was carried out, but its response of {len(long)} bytes cannot be sent: "
            "the limit of 1500000 bytes of ids, and of messages that are on their way for one user is reached"
        )
        assert len(slow.receive()) == len(long) - 8
        wait_until(lambda: counted() == 0, "it is given back")
        assert len(other.ask("x")) == len(long) - 8
        slow.send(message("x"))
        wait_until(lambda: counted() == len(long), "it is on its way")
        slow.close()
        wait_until(lambda: counted() == 0, "it is given back though nobody took it")


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


def test_fd_for_a_client_that_has_gone_is_closed(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("wait") + message("fd") + message("fd"))
    client.close()
    answering.proceed.set()
    wait_until(lambda: not house.server._connections, "it is forgotten")
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
        wait_until(lambda: bool(house.server.idle._waiting), "it is silent")
        assert client.ask("x") == UNKNOWN


class Waiting:
    """A connection that takes nothing: notes how long it would be waited for."""

    def __init__(self) -> None:
        self.timeouts: list[bytes] = []

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        self.timeouts.append(value)

    def send(self, flags: int) -> int:
        raise BlockingIOError


@pytest.mark.parametrize("left", [1.0, 1e-3, 1e-5, 9e-7, 1e-7, 0.0, -1.0])
def test_last_microsecond_is_not_for_ever(monkeypatch: pytest.MonkeyPatch, left: float) -> None:
    """To the kernel a timeout of 0 is none at all."""
    monkeypatch.setattr(connection_module, "time", SimpleNamespace(monotonic=lambda: 1_000.0))
    connection = Connection.__new__(Connection)
    request = Waiting()
    connection.request = request  # type: ignore[assignment]  # in its place
    with pytest.raises(TimeoutError, match="a response was not taken in time"):
        connection._send_by(1_000.0 + left, request.send)
    assert bytes(16) not in request.timeouts


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
                if not house.server._connections:
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
    assert len(house.server._connections) == 1


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
