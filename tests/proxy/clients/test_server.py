"""Connections: how many, for how long, and what becomes of them when fds, threads or time run out."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.api import messages
from cc_proxy.continuity.state.clients import ConnectionState, ListenerState, ServerState
from cc_proxy.linux.fds import Fd, close_stream, may_hold_fds
from cc_proxy.proxy.clients import roster as roster_module
from cc_proxy.proxy.clients import server as server_module
from cc_proxy.proxy.clients.connection import Connection
from cc_proxy.proxy.clients.parking import Parking
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.clients.workers import Workers
from cc_proxy.settings import Limits
from tests.proxy.conftest import Logged
from tests.proxy.house import UNKNOWN, Answering, House, limited
from tests.proxy.support import open_fds
from tests.wire.support import (
    WAIT,
    at_end,
    is_silent,
    message,
    read_exact,
    refused,
    request,
    wait_until,
)

# Connections ----------------------------------------------------------------------------------------------


def test_connections_are_numbered_and_forgotten(house: House, answering: Answering) -> None:
    for _ in range(3):
        client = house.connect()
        for _ in range(2):
            client.send(message("x"))
            assert client.receive() == b"answer"
        client.close()
    wait_until(lambda: not house.has("connections"), "all are forgotten")
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
        wait_until(lambda: house.has("connections") == 1, "there is room again")
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


def test_thread_that_cannot_be_had_costs_that_request(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    def refuse(workers: Workers, name: str, work: Callable[[], object]) -> None:
        raise RuntimeError("can't start new thread")

    client, half = house.connect(), house.connect()
    with monkeypatch.context() as patch:
        patch.setattr(Workers, "start", refuse)
        client.send(request("hyper") + request("x") + request("hyper"))
        answers = [client.receive() for _ in range(3)]
        half.send(b"\0")
        assert half.receive() == refused("the daemon cannot start another thread")
        assert at_end(half.sock)
    assert answers == [refused("the daemon cannot start another thread"), UNKNOWN, answers[0]]
    assert client.ask("hyper") == refused("client not attached to a vm")
    assert logged.at(logging.WARNING) == ["no thread for a request"] * 3


def test_request_from_the_process_before_waits_for_a_thread(
    tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch, answering: Answering
) -> None:
    """What it waits for may be next in a VM's line, and nobody else would take it out there."""
    ours, theirs = socket.socketpair()
    asked = ConnectionState(
        fd=Fd(ours.detach()),
        number=7,
        vm=None,
        unread=b"",
        text=b"x",
        delay=0.0,
        unsent=b"",
        passed=None,
        left=None,
        counted=0,
    )
    refused_it = Counter[str]()

    def refuse(workers: Workers, name: str, work: Callable[[], object]) -> None:
        refused_it[name] += 1
        raise RuntimeError("can't start new thread")

    with theirs, ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(Workers, "start", refuse)
            state = ServerState(ListenerState(Fd(-1), None, False), [asked], 8)
            house = House(tmp_sock_dir, state=state)
            stack.callback(house.close)
            wait_until(lambda: refused_it["client 7"] > 1, "it is tried again")
            assert is_silent(theirs)
        assert read_exact(theirs, 14) == messages.frame_text(b"answer")
        assert answering.clients == [7]


def test_connection_that_may_find_no_memory_for_its_thread_is_not_let_in(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests may need one."""

    def refuse() -> None:
        raise RuntimeError("no memory for another thread")

    with monkeypatch.context() as patch:
        patch.setattr(server_module, "check_room", refuse)
        client = house.connect()
        assert client.receive() == refused("the daemon cannot start another thread")
        assert at_end(client.sock)
    assert not house.has("connections")
    assert house.connect().ask("x") == UNKNOWN


def test_connection_that_cannot_be_watched_is_told_so_and_forgotten(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its user has as many fds in epoll instances as the kernel allows."""

    def refuse(parking: Parking[Connection], connection: Connection) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Parking, "park", refuse)
        client = house.connect()
        assert b"No space left on device" in client.receive()
        assert at_end(client.sock)
    wait_until(lambda: not house.has("connections"), "it counts no more")
    other = house.connect()
    assert json.loads(other.ask("status"))["data"]["connections"] == 1


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
    monkeypatch.setattr(server_module, "_SHORTAGE_PAUSE", 0.02)
    tries = Tries(house.server.socket)
    monkeypatch.setattr(house.server, "socket", tries)
    first = house.connect()
    assert first.ask("x") == UNKNOWN
    fds = len(open_fds())
    for times in (1, 2):
        wait_until(lambda: len(open_fds()) == fds, "none is about to be closed")
        waiting = socket.socket(socket.AF_UNIX)
        waiting.settimeout(WAIT)
        with waiting:
            del tries.failed_at[:]
            with without_fds():
                waiting.connect(str(house.path))
                wait_until(lambda: len(tries.failed_at) >= 4, "it tries again")
                assert first.ask("x") == UNKNOWN, "who is there is served"
            waiting.sendall(request("x"))
            assert waiting.recv(8)
            assert waiting.recv(100) == UNKNOWN
        waits = [after - before for before, after in pairwise(tries.failed_at)]
        assert min(waits) >= 0.015, "it waits between tries: it does not spin"
        assert logged.fields("no connection can be accepted") == [{"error": "Too many open files"}] * times


class Tries:
    """A listening socket that notes when it could not accept."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.failed_at: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def accept(self) -> object:
        try:
            return self._sock.accept()
        except BlockingIOError:
            raise
        except OSError:
            self.failed_at.append(time.monotonic())
            raise


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM])
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


def test_shortage_does_not_delay_the_end(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setattr(server_module, "_SHORTAGE_PAUSE", 3_600.0)
    waiting = socket.socket(socket.AF_UNIX)
    with waiting:
        with without_fds():
            waiting.connect(str(house.path))
            wait_until(lambda: bool(logged.at(logging.ERROR)), "there is no room")
        assert house.stop()


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
        monkeypatch.setattr(roster_module, "close_stream", self._close)
        for check in ("may_hold_fds", "holds_fds"):
            monkeypatch.setattr(roster_module, check, lambda sock: True)

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


@pytest.mark.parametrize("passes", [False, True])
def test_only_who_has_passed_fds_takes_a_thread_to_be_turned_away(
    house: House, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    """Where the kernel lets them: before Linux 6.16, or with who had connected to an inherited socket."""
    started: list[str] = []
    start = Workers.start

    def note(workers: Workers, name: str, work: Callable[[], object]) -> None:
        started.append(name)
        start(workers, name, work)

    monkeypatch.setattr(Workers, "start", note)
    near, far = socket.socketpair()
    with far:
        socket.send_fds(far, [b"x"], [far.fileno()] * passes)
        house.server.shutdown_request(near)
        assert at_end(far)
    assert started == ["close"] * passes


def test_connection_that_cannot_be_closed_in_order_counts_no_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sock: socket.socket) -> None:
        sock.close()
        raise MemoryError

    client = house.connect()
    assert client.ask("x") == UNKNOWN
    with monkeypatch.context() as patch:
        patch.setattr(roster_module, "close_stream", fail)
        client.close()
        wait_until(lambda: not house.has("connections"), "it counts no more")


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
        wait_until(lambda: not house.has("connections"), "it is forgotten")


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
    wait_until(lambda: not house.has("connections"), "it is forgotten")


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


def test_nobody_comes_any_more_through_a_socket_that_was_removed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has it open still has a path to it, and could keep the daemon from its end."""
    still_open = os.open(house.path, os.O_PATH)
    take_in = Server._take_in
    refusals: list[OSError] = []

    def bring_another(server: Server, sock: socket.socket) -> None:
        take_in(server, sock)
        assert house.has("connections") <= 10, "there would be no end"
        another = stack.enter_context(socket.socket(socket.AF_UNIX))
        try:
            another.connect(f"/proc/self/fd/{still_open}")
        except ConnectionRefusedError as error:
            refusals.append(error)

    monkeypatch.setattr(Server, "get_request", no_request)
    monkeypatch.setattr(Server, "_take_in", bring_another)
    with ExitStack() as stack:
        stack.callback(os.close, still_open)
        late = [house.connect() for _ in range(2)]
        for client in late:
            client.send(request("x"))
        assert house.stop()
        assert [client.receive() for client in late] == [UNKNOWN] * 2
    assert len(refusals) == 2


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


# What the watchdog looks at -------------------------------------------------------------------------------


def test_accept_thread_takes_its_turns_while_nobody_connects(house: House) -> None:
    before = house.server.turned_at
    wait_until(lambda: house.server.turned_at > before, "a turn")


def test_lock_is_free_unless_somebody_holds_it(house: House) -> None:
    assert house.server.roster.is_free(WAIT)
    assert not house.server.roster._lock.locked()
    with house.server.roster._lock:
        assert not house.server.roster.is_free(0.01)
