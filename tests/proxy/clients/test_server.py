"""Connections: how many, for how long, and what becomes of them when fds, threads or time run out."""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

import pytest

from cc_proxy.api import messages
from cc_proxy.continuity.state.clients import ConnectionState, ListenerState, ServerState
from cc_proxy.linux.credentials import Credentials
from cc_proxy.linux.fds import Fd, close_stream, may_hold_fds
from cc_proxy.proxy.clients import roster as roster_module
from cc_proxy.proxy.clients import server as server_module
from cc_proxy.proxy.clients.parking import Parking
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.clients.workers import Workers
from cc_proxy.settings import Limits
from tests.faults import broken
from tests.locks import lock_of
from tests.proxy.conftest import Logged
from tests.proxy.house import UNKNOWN, Answering, House, limited
from tests.proxy.support import open_fds
from tests.shortages import few_fds, no_threads
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


def test_thread_that_cannot_be_had_costs_that_request(house: House, logged: Logged) -> None:
    client, half = house.connect(), house.connect()
    with no_threads():
        client.send(request("hyper") + request("x") + request("hyper"))
        answers = [client.receive() for _ in range(3)]
        half.send(b"\0")
        assert half.receive() == refused("the daemon cannot start another thread")
        assert at_end(half.sock)
    assert answers == [refused("the daemon cannot start another thread"), UNKNOWN, answers[0]]
    assert client.ask("hyper") == refused("client not attached to a vm")
    assert logged.at(logging.WARNING) == ["no thread for a request"] * 3


def test_request_from_the_process_before_waits_for_a_thread(tmp_sock_dir: Path, answering: Answering) -> None:
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
    tries: list[str] = []

    def note(_workers: Workers, name: str, _work: object) -> bool:
        tries.append(name)
        return True

    with theirs, ExitStack() as stack:
        with broken(Workers, "start", RuntimeError("can't start new thread"), when=note):
            state = ServerState(ListenerState(Fd(-1), None, False), [asked], 8)
            house = House(tmp_sock_dir, state=state)
            stack.callback(house.close)
            wait_until(lambda: tries.count("client 7") > 1, "it is tried again")
            assert is_silent(theirs)
        assert read_exact(theirs, 14) == messages.frame_text(b"answer")
        assert answering.clients == [7]


def test_connection_that_may_find_no_memory_for_its_thread_is_not_let_in(
    house: House,
) -> None:
    """Its requests may need one."""
    with broken(server_module, "check_room", RuntimeError("no memory for another thread")):
        client = house.connect()
        assert client.receive() == refused("the daemon cannot start another thread")
        assert at_end(client.sock)
    assert not house.has("connections")
    assert house.connect().ask("x") == UNKNOWN


def test_connection_that_cannot_be_watched_is_told_so_and_forgotten(
    house: House,
) -> None:
    """As when its user has as many fds in epoll instances as the kernel allows."""
    with broken(Parking, "park", OSError(errno.ENOSPC, "No space left on device")):
        client = house.connect()
        assert b"No space left on device" in client.receive()
        assert at_end(client.sock)
    wait_until(lambda: not house.has("connections"), "it counts no more")
    other = house.connect()
    assert json.loads(other.ask("status"))["data"]["connections"] == 1


# Fds ------------------------------------------------------------------------------------------------------


def test_without_fds_it_waits_and_says_so_once_and_accepts_again(house: House, logged: Logged) -> None:
    first = house.connect()
    assert first.ask("x") == UNKNOWN
    fds = len(open_fds())
    for _ in range(2):
        logged.records.clear()
        wait_until(lambda: len(open_fds()) == fds, "none is about to be closed")
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.settimeout(WAIT)
            with few_fds():
                waiting.connect(str(house.path))
                wait_until(lambda: bool(logged.at(logging.ERROR)), "it has tried")
                before = cpu_seconds("accept")
                assert not select.select([waiting], [], [], 0.3)[0]
                assert first.ask("x") == UNKNOWN, "who is there is served"
                assert cpu_seconds("accept") - before < 0.1, "it waits between tries: it does not spin"
            waiting.sendall(request("x"))
            assert waiting.recv(8)
            assert waiting.recv(100) == UNKNOWN
        assert logged.fields("no connection can be accepted") == [{"error": "Too many open files"}]


def cpu_seconds(name: str) -> float:
    """What a thread of this process has run so far."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    return float(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM])
def test_every_shortage_is_waited_out(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged, number: int
) -> None:
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


def test_connection_that_cannot_be_closed_in_order_counts_no_more(house: House) -> None:
    def closed(sock: socket.socket) -> bool:
        sock.close()
        return True

    client = house.connect()
    assert client.ask("x") == UNKNOWN
    with broken(roster_module, "close_stream", MemoryError(), when=closed):
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


def test_it_stops_even_if_it_is_told_before_it_has_begun(tmp_sock_dir: Path) -> None:
    told = threading.Event()

    def begin_late(thread: threading.Thread) -> bool:
        return thread.name == "accept" and not told.wait(WAIT)

    with (
        broken(threading.Thread, "run", when=begin_late),
        broken(Server, "shutdown", when=lambda _: told.set()),
    ):
        stopping = threading.Thread(target=House(tmp_sock_dir).stop, daemon=True)
        stopping.start()
        stopping.join(WAIT)
        assert not stopping.is_alive()


def not_accepted() -> AbstractContextManager[object]:
    """The accept thread does not get to those who connect meanwhile."""
    return broken(Server, "get_request", BlockingIOError())


def test_who_has_connected_to_an_own_socket_is_still_served(house: House) -> None:
    with not_accepted():
        late = [house.connect() for _ in range(5)]
        for client in late:
            client.send(request("x"))
        assert house.stop()
    for client in late:
        assert client.receive() == UNKNOWN
        assert at_end(client.sock)


def test_nobody_comes_any_more_through_a_socket_that_was_removed(house: House) -> None:
    """Who has it open still has a path to it, and could keep the daemon from its end."""
    still_open = os.open(house.path, os.O_PATH)
    refusals: list[OSError] = []

    def bring_another(_: socket.socket) -> bool:
        assert house.has("connections") <= 10, "there would be no end"
        another = stack.enter_context(socket.socket(socket.AF_UNIX))
        try:
            another.connect(f"/proc/self/fd/{still_open}")
        except ConnectionRefusedError as error:
            refusals.append(error)
        return False

    with ExitStack() as stack:
        stack.callback(os.close, still_open)
        stack.enter_context(not_accepted())
        late = [house.connect() for _ in range(2)]
        for client in late:
            client.send(request("x"))
        with broken(Credentials, "of_peer", when=bring_another):  # whenever one is taken in
            assert house.stop()
        assert [client.receive() for client in late] == [UNKNOWN] * 2
    assert len(refusals) == 2


def test_who_has_connected_to_an_inherited_socket_is_left_to_the_next_daemon(tmp_sock_dir: Path) -> None:
    house = House(tmp_sock_dir, own=False)
    with not_accepted():
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


# What the watchdog looks at -------------------------------------------------------------------------------


def test_accept_thread_takes_its_turns_while_nobody_connects(house: House) -> None:
    before = house.server.turned_at
    wait_until(lambda: house.server.turned_at > before, "a turn")


def test_lock_is_free_unless_somebody_holds_it(house: House) -> None:
    assert house.server.roster.is_free(WAIT)
    with lock_of(house.server.roster):
        assert not house.server.roster.is_free(0.01)
