"""Connections: how many, for how long, and what becomes of them when fds, threads or time run out."""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cc_proxy.api import messages
from cc_proxy.api.payloads import Response
from cc_proxy.fds import close_stream, may_hold_fds
from cc_proxy.proxy import server as server_module
from cc_proxy.proxy.crew import Crew
from cc_proxy.proxy.eager import Eager
from cc_proxy.proxy.handlers import Client, Handlers, Reply
from cc_proxy.proxy.listener import Listener
from cc_proxy.proxy.registry import Registry
from cc_proxy.proxy.server import Connection, Server
from cc_proxy.proxy.shares import Share
from cc_proxy.settings import Limits, LiveSettings, Settings
from tests.proxy.conftest import Logged
from tests.proxy.support import NEVER, open_fds, read_to_end
from tests.wire.support import (
    WAIT,
    RawClient,
    at_end,
    is_silent,
    message,
    refused,
    request,
    wait_until,
)

UNKNOWN = refused("no payload named 'x'")
DEFAULT_LIMITS = Limits()


class House:
    """A server that runs, and clients of it."""

    def __init__(self, directory: Path, limits: Limits = DEFAULT_LIMITS, *, own: bool = True) -> None:
        self.path = directory / "sock"
        self._stack = ExitStack()
        if own:
            listener = Listener.bind(str(self.path))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(self.path))
            sock.listen()
            self.kept = sock.dup()
            self._stack.callback(self.kept.close)
            listener = Listener(sock)
        self._listener = listener
        live = LiveSettings(Settings(limits=limits))
        self.server = Server(listener, Registry(live), live)
        self.server.start()
        self._stopped = False

    def connect(self) -> RawClient:
        client = RawClient(self.path)
        self._stack.callback(client.close)
        return client

    def stop(self, seconds: float = WAIT) -> bool:
        self._stopped = True
        self.server.stop_accepting()
        try:
            return self.server.join_connections(seconds)
        finally:
            self.server.server_close()

    def close(self) -> None:
        self._stack.close()
        if not self._stopped:
            self.stop()
        self._listener.remove()


@pytest.fixture(autouse=True)
def quick_and_reversible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(server_module, "_STOP_POLL", 0.01)
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def house(tmp_sock_dir: Path) -> Iterator[House]:
    house = House(tmp_sock_dir)
    yield house
    house.close()


@contextmanager
def limited(directory: Path, limits: Limits) -> Iterator[House]:
    house = House(directory, limits)
    try:
        yield house
    finally:
        house.close()


class Answering:
    """Handlers whose answers a test chooses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clients: list[int] = []
        self.passed: list[socket.socket] = []
        self.proceed = threading.Event()
        self.error: Exception | None = None
        monkeypatch.setattr(Handlers, "answer", lambda handlers, client, text: self.answer(client, text))

    def answer(self, client: Client, text: bytes) -> Reply:
        self.clients.append(client.number)
        if text == b"wait":
            assert self.proceed.wait(WAIT)
        if text == b"error":
            raise KeyError("nobody expects it")
        if text == b"fd":
            near, far = socket.socketpair()
            near.close()
            self.passed.append(far)
            return Reply(messages.frame_text(b"here it is"), far)
        return Reply(messages.frame_text(b"answer"))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Answering:
    return Answering(monkeypatch)


# Connections ----------------------------------------------------------------------------------------------


def test_connections_are_numbered_and_forgotten(house: House, answering: Answering) -> None:
    for _ in range(3):
        client = house.connect()
        for _ in range(2):
            client.send(message("x"))
            assert client.receive() == b"answer"
        client.close()
    wait_until(lambda: not house.server._connections, "all are forgotten")
    assert answering.clients == [1, 1, 2, 2, 3, 3]


def test_no_more_connections_than_the_settings_allow(tmp_sock_dir: Path, logged: Logged) -> None:
    with limited(tmp_sock_dir, Limits(connections=2)) as house:
        clients = [house.connect() for _ in range(2)]
        assert [client.ask("x") for client in clients] == [UNKNOWN] * 2
        turned_away = house.connect()
        assert turned_away.receive() == refused("the limit of 2 connections is reached")
        assert at_end(turned_away.sock)
        assert [client.ask("x") for client in clients] == [UNKNOWN] * 2
        clients[0].close()
        wait_until(lambda: len(house.server._connections) == 1, "there is room again")
        assert house.connect().ask("x") == UNKNOWN
        fields = {"pid": os.getpid(), "uid": os.getuid(), "error": "the limit of 2 connections is reached"}
        assert logged.fields("connection refused") == [fields]


def test_turned_away_though_it_reads_and_sends_what_it_likes(tmp_sock_dir: Path) -> None:
    """It gets the error and a clean end, whatever it has sent by then."""
    with limited(tmp_sock_dir, Limits(connections=1)) as house:
        assert house.connect().ask("x") == UNKNOWN
        for _ in range(20):
            client = house.connect()
            with suppress(BrokenPipeError):
                client.send(request("x") * 100)
            assert client.receive() == refused("the limit of 1 connections is reached")
            assert at_end(client.sock)


def test_thread_that_cannot_be_had_costs_that_connection(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("client "):
            raise RuntimeError("can't start new thread")
        start(thread)

    first = house.connect()
    assert first.ask("x") == UNKNOWN
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            client = house.connect()
            assert client.receive() == refused("the daemon cannot start another thread")
            assert at_end(client.sock)
    assert house.connect().ask("x") == UNKNOWN
    assert first.ask("x") == UNKNOWN
    assert len(house.server._connections) == 2
    assert logged.at(logging.WARNING) == ["connection refused"] * 3


# Fds ------------------------------------------------------------------------------------------------------


@contextmanager
def without_fds() -> Iterator[None]:
    """Not one fd is to be had in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        highest = max(open_fds()) + 1
        while (fd := os.eventfd(0)) < highest:
            stack.callback(os.close, fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_fds_it_waits_and_says_so_once_and_accepts_again(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(server_module, "_SHORTAGE_PAUSE", 0.02)
    wait_for_room = Server._wait_for_room

    def counted(server: Server, error: OSError) -> None:
        begun = time.monotonic()
        wait_for_room(server, error)
        waits.append(time.monotonic() - begun)

    monkeypatch.setattr(Server, "_wait_for_room", counted)
    first = house.connect()
    assert first.ask("x") == UNKNOWN
    fds = len(open_fds())
    for times in (1, 2):
        wait_until(lambda: len(open_fds()) == fds, "none is about to be closed")
        waiting = socket.socket(socket.AF_UNIX)
        waiting.settimeout(WAIT)
        with waiting:
            del waits[:]
            with without_fds():
                waiting.connect(str(house.path))
                wait_until(lambda: len(waits) >= 3, "it tries again")
                assert first.ask("x") == UNKNOWN, "who is there is served"
            waiting.sendall(request("x"))
            assert waiting.recv(8)
            assert waiting.recv(100) == UNKNOWN
        assert min(waits) >= 0.015, "each try waits first: it does not spin"
        assert logged.fields("no connection can be accepted") == [{"error": "Too many open files"}] * times


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_every_shortage_is_waited_out(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged, number: int
) -> None:
    monkeypatch.setattr(server_module, "_SHORTAGE_PAUSE", 0.001)
    short = Short(house.server.socket, number)
    monkeypatch.setattr(house.server, "socket", short)
    client = house.connect()
    assert short.given_up.wait(WAIT)
    assert logged.at(logging.ERROR) == ["no connection can be accepted"]
    short.over = True
    assert client.ask("x") == UNKNOWN
    monkeypatch.undo()


class Short:
    """A listening socket that there is no room behind."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self._sock = sock
        self._number = number
        self._tries = 0
        self.given_up = threading.Event()
        self.over = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> object:
        if self.over:
            return self._sock.accept()
        self._tries += 1
        if self._tries == 5:
            self.given_up.set()
        raise OSError(self._number, os.strerror(self._number))


def test_shortage_does_not_delay_the_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_SHORTAGE_PAUSE", 3_600.0)
    waiting = socket.socket(socket.AF_UNIX)
    with waiting:
        reached = threading.Event()
        wait_for_room = Server._wait_for_room

        def note(server: Server, error: OSError) -> None:
            reached.set()
            wait_for_room(server, error)

        monkeypatch.setattr(Server, "_wait_for_room", note)
        with without_fds():
            waiting.connect(str(house.path))
            assert reached.wait(WAIT)
        assert house.stop()


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


@pytest.mark.parametrize("own", [True, False], ids=["own socket", "inherited"])
def test_client_cannot_pass_fds(tmp_sock_dir: Path, own: bool) -> None:
    house = House(tmp_sock_dir, own=own)
    try:
        client = house.connect()
        if may_hold_fds(house.server.socket):
            pytest.skip("needs Linux 6.16")
        with pytest.raises(PermissionError):
            socket.send_fds(client.sock, [request("x")], [0])
        assert client.ask("x") == UNKNOWN
    finally:
        house.close()


class Closing:
    """Connections whose closing takes as long as their clients chose."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.over = threading.Event()
        monkeypatch.setattr(server_module, "close_stream", self._close)
        monkeypatch.setattr(server_module, "may_hold_fds", lambda sock: True)

    def _close(self, sock: socket.socket) -> None:
        self.begun.release()
        assert self.over.wait(WAIT)
        close_stream(sock)


def test_nobody_waits_until_who_is_turned_away_is_closed(
    tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with limited(tmp_sock_dir, Limits(connections=1)) as house:
        closing = Closing(monkeypatch)
        try:
            first = house.connect()
            assert first.ask("x") == UNKNOWN
            for _ in range(3):
                assert house.connect().receive() == refused("the limit of 1 connections is reached")
            for _ in range(3):
                assert closing.begun.acquire(timeout=WAIT)
            assert first.ask("x") == UNKNOWN
        finally:
            closing.over.set()


def test_connection_counts_until_it_is_closed(tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with limited(tmp_sock_dir, Limits(connections=1)) as house:
        closing = Closing(monkeypatch)
        try:
            first = house.connect()
            assert first.ask("x") == UNKNOWN
            first.close()
            assert closing.begun.acquire(timeout=WAIT)
            assert house.connect().receive() == refused("the limit of 1 connections is reached")
        finally:
            closing.over.set()
        wait_until(lambda: not house.server.shares.users(), "it is forgotten")


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
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: 1_000.0))
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


# The end --------------------------------------------------------------------------------------------------


def test_at_the_end_what_was_asked_is_answered_and_nobody_else_let_in(
    house: House, answering: Answering
) -> None:
    idle, asker = house.connect(), house.connect()
    idle.send(message("x"))
    assert idle.receive() == b"answer"
    asker.send(message("wait") + message("x"))
    wait_until(lambda: len(answering.clients) == 2, "it is being answered")
    results: list[bool] = []
    stopping = threading.Thread(target=lambda: results.append(house.stop()))
    stopping.start()
    assert at_end(idle.sock), "idle ones do not hold it up"
    assert not house.path.exists()
    answering.proceed.set()
    assert asker.receive() == b"answer"
    assert asker.receive() == b"answer"
    assert at_end(asker.sock)
    stopping.join(WAIT)
    assert results == [True]


def test_at_the_end_who_is_not_ready_in_time_is_cut_off(house: House, answering: Answering) -> None:
    client = house.connect()
    client.send(message("wait"))
    wait_until(lambda: bool(answering.clients), "it is being answered")
    assert not house.stop(0.01)
    assert at_end(client.sock)
    answering.proceed.set()
    wait_until(lambda: not house.server._connections, "it is forgotten")


def test_connection_that_comes_too_fast_is_served_once_nobody_else_is_there(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Share, "arrive", lambda _: NEVER)
    assert house.connect().ask("x") == UNKNOWN


def test_error_that_nobody_expects_costs_a_connection_that_waits_its_turn(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Share, "arrive", lambda _: NEVER)
    with monkeypatch.context() as patch:
        patch.setattr(Crew, "hand_over", fail)
        client = house.connect()
        assert at_end(client.sock)
    assert logged.at(logging.ERROR) == ["connection failed"]
    assert house.connect().ask("x") == UNKNOWN
    wait_until(lambda: len(house.server._connections) == 1, "only the second is known")


def test_it_stops_even_if_it_is_told_before_it_has_begun(
    tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Server._accept_all

    def begin_late(server: Server) -> None:
        assert server._stopping.wait(WAIT)
        real(server)

    monkeypatch.setattr(Server, "_accept_all", begin_late)
    stopping = threading.Thread(target=House(tmp_sock_dir).stop, daemon=True)
    stopping.start()
    stopping.join(WAIT)
    assert not stopping.is_alive()


def test_who_has_connected_to_an_own_socket_is_still_served(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "get_request", no_request)
    late = [house.connect() for _ in range(5)]
    for client in late:
        client.send(request("x"))
    assert house.stop()
    for client in late:
        assert client.receive() == UNKNOWN
        assert at_end(client.sock)


def test_who_has_connected_to_an_inherited_socket_is_left_to_the_next_daemon(
    tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_sock_dir, own=False)
    monkeypatch.setattr(Server, "get_request", no_request)
    late = house.connect()
    late.send(request("x"))
    assert house.stop()
    assert is_silent(late.sock)
    assert house.path.exists()
    house.kept.settimeout(WAIT)
    successors, _ = house.kept.accept()
    with successors:
        assert successors.recv(100) == request("x")
    house.close()


def no_request(server: Server) -> object:
    """The accept thread does not get to it before the end."""
    raise OSError(errno.EAGAIN, "not now")


def test_responses_are_written_whole(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    text = messages.encode(Response(False, "x" * 1_000_000))
    monkeypatch.setattr(Handlers, "answer", lambda *_: Reply(text))
    client = house.connect()
    client.send(request("x") * 3)
    for _ in range(3):
        assert len(client.receive()) == len(text) - 8


# What the watchdog looks at -------------------------------------------------------------------------------


def test_accept_thread_takes_its_turns_while_nobody_connects(house: House) -> None:
    before = house.server.turned_at
    wait_until(lambda: house.server.turned_at > before, "a turn")


def test_lock_is_free_unless_somebody_holds_it(house: House) -> None:
    assert house.server.is_free(WAIT)
    assert not house.server._lock.locked()
    with house.server._lock:
        assert not house.server.is_free(0.01)


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
