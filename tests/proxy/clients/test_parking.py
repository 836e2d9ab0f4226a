"""Waiting for clients: each is woken when there is something for it, and no user waits for another's."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.proxy.clients import parking as idle_module
from cc_proxy.proxy.clients.parking import Idle
from tests.proxy.conftest import Logged
from tests.proxy.support import NEVER, open_fds, pair
from tests.wire.support import WAIT, in_background, wait_until

ALICE, BOB = 1, 2


@pytest.fixture
def idle() -> Iterator[Idle]:
    before = set(open_fds())
    idle = Idle()
    for uid in (ALICE, BOB):
        idle.admit(uid)
    idle.start()
    yield idle
    idle.close()
    assert set(open_fds()) == before


@pytest.mark.parametrize("how", ["sends", "goes", "is shut down"])
def test_who_waits_is_woken(idle: Idle, how: str) -> None:
    near, far = pair()
    with near, far, in_background(lambda: idle.wait(ALICE, near, WAIT)):
        wait_until(lambda: bool(idle._waiting), "it waits")
        if how == "sends":
            far.send(b"x")
        elif how == "goes":
            far.close()
        else:
            near.shutdown(socket.SHUT_RD)
        wait_until(lambda: not idle._waiting, "it is woken", WAIT / 2)


def test_what_is_there_already_is_not_waited_for(idle: Idle) -> None:
    near, far = pair()
    with near, far:
        far.send(b"x")
        for _ in range(3):
            idle.wait(ALICE, near, None)


def test_waiting_has_an_end(idle: Idle) -> None:
    near, far = pair()
    with near, far:
        begun = time.monotonic()
        idle.wait(ALICE, near, 0.02)
        assert time.monotonic() - begun >= 0.02
    assert not idle._waiting


def test_the_end_wakes_all() -> None:
    idle = Idle()
    idle.admit(ALICE)
    idle.start()
    near, far = pair()
    with near, far, in_background(lambda: idle.wait(ALICE, near, None)):
        wait_until(lambda: bool(idle._waiting), "it waits")
        idle.close()


def watched(epoll: select.epoll) -> int:
    """How many fds it has."""
    return Path(f"/proc/self/fdinfo/{epoll.fileno()}").read_text().count("tfd:")


def test_no_user_waits_until_all_of_another_are_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alice's clients have all gone before Bob's one says something."""
    monkeypatch.setattr(idle_module, "_AT_ONCE", 2)
    woken: list[int] = []
    idle = Idle()
    for uid in (ALICE, BOB):
        idle.admit(uid)

    def wait(uid: int, sock: socket.socket) -> None:
        idle.wait(uid, sock, WAIT)

    class Noted(dict[int, object]):
        """Who is looked up is about to be woken."""

        def get(self, fd: int, default: object = None) -> object:
            woken.append(fd)
            return super().get(fd, default)

    idle._waiting = Noted()  # type: ignore[assignment]
    with ExitStack() as stack:
        alices = [pair() for _ in range(20)]
        bob, bobs_client = pair()
        bobs_fd = bob.fileno()
        for sock in (*(sock for ends in alices for sock in ends), bob, bobs_client):
            stack.enter_context(sock)
        threads = [threading.Thread(target=wait, args=(ALICE, near)) for near, _ in alices]
        threads.append(threading.Thread(target=wait, args=(BOB, bob)))
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(map(watched, idle._clients.values())) == 21, "all wait")
        for _, far in alices:
            far.close()
        bobs_client.send(b"x")
        idle.start()
        for thread in threads:
            thread.join(WAIT)
        idle.close()
    assert len(woken) >= 21
    assert woken.index(bobs_fd) < 4


def test_error_that_nobody_expected_wakes_nobody_less(
    idle: Idle, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    real, failures = Idle._wake_some, [KeyError("nobody expects it")]

    def fail_once(self: Idle, fd: int) -> None:
        if failures:
            raise failures.pop()
        real(self, fd)

    monkeypatch.setattr(Idle, "_wake_some", fail_once)
    near, far = pair()
    with near, far, in_background(lambda: idle.wait(ALICE, near, WAIT)):
        wait_until(lambda: bool(idle._waiting), "it waits")
        far.send(b"x")
        wait_until(lambda: not idle._waiting, "it is woken", WAIT / 2)
    assert "waking connections failed" in logged.at(40)


def test_its_thread_answers_unless_it_hangs(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    here, go = threading.Event(), threading.Event()

    def hang(fd: int) -> None:
        here.set()
        go.wait(WAIT)

    assert idle.answers()
    wait_until(lambda: not idle._asked, "it has answered")
    monkeypatch.setattr(idle, "_wake_some", hang)
    near, far = pair()
    with near, far, in_background(lambda: idle.wait(ALICE, near, WAIT)):
        far.send(b"x")
        assert here.wait(WAIT)
        assert idle.answers(), "it has been asked only now"
        assert not idle.answers()
        monkeypatch.undo()
        go.set()
    wait_until(lambda: not idle._asked, "it goes on")


def test_who_has_gone_leaves_nothing(idle: Idle) -> None:
    before = set(open_fds())
    for uid in range(10, 30):
        idle.admit(uid)
        idle.admit(uid)
        idle.dismiss(uid)
        near, far = pair()
        with near, far:
            far.send(b"x")
            idle.wait(uid, near, None)
        idle.dismiss(uid)
    assert set(open_fds()) == before
    assert set(idle._connections) == set(idle._clients) == {ALICE, BOB}


class Full:
    """An epoll instance that takes no more."""

    def register(self, *_: object) -> None:
        raise OSError(28, "No space left on device")


def test_who_could_not_be_admitted_can_be_later(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(open_fds())
    with monkeypatch.context() as patch:
        patch.setattr(idle, "_users", Full())
        with pytest.raises(OSError, match="No space"):
            idle.admit(3)
    assert set(open_fds()) == before
    idle.admit(3)
    near, far = pair()
    with near, far:
        far.send(b"x")
        idle.wait(3, near, None)


def test_who_comes_after_the_end_waits_for_nothing() -> None:
    idle = Idle()
    idle.admit(ALICE)
    idle.start()
    idle.close()
    near, far = pair()
    with near, far:
        idle.wait(ALICE, near, None)
        idle._stopping = False  # as for who has just looked when it ends
        idle.wait(ALICE, near, None)
        idle._stopping = True
    idle.dismiss(ALICE)


def test_who_goes_while_it_ends_is_waited_for() -> None:
    """Its epoll instance is closed once, by one of both."""
    idle = Idle()
    idle.admit(ALICE)
    with idle._lock:  # as in `dismiss`
        ending = threading.Thread(target=idle.close)
        ending.start()
        wait_until(lambda: idle._stopping, "it ends")
        ending.join(0.05)
        assert ending.is_alive()
    ending.join(WAIT)
    assert not ending.is_alive()


def test_what_is_to_be_done_later_is_done_in_its_turn_and_not_before(idle: Idle) -> None:
    done: list[tuple[str, float]] = []
    begun = time.monotonic()
    for name, seconds in (("last", 0.04), ("first", 0.02), ("second", 0.02)):
        idle.call_later(seconds, lambda name=name: done.append((name, time.monotonic())))  # type: ignore[misc]
    wait_until(lambda: len(done) == 3, "all is done")
    assert [name for name, _ in done] == ["first", "second", "last"]
    assert done[0][1] >= begun + 0.02
    assert done[2][1] >= begun + 0.04


def test_what_was_to_be_done_later_is_done_at_the_end(idle: Idle) -> None:
    done: list[int] = []
    for number in range(3):
        idle.call_later(NEVER, lambda number=number: done.append(number))  # type: ignore[misc]
    idle.call_all()
    assert done == [0, 1, 2]


def test_at_the_end_what_is_being_done_is_waited_for(idle: Idle) -> None:
    here, done = threading.Event(), []

    def work() -> None:
        here.set()
        time.sleep(0.05)
        done.append("work")

    idle.call_later(0.0, work)
    assert here.wait(WAIT)
    idle.call_all()
    assert done == ["work"]


def test_at_the_end_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_module, "_LAST_CALL", 0.01)
    idle = Idle()
    idle.call_all()
    idle.close()


def test_once_nobody_has_to_wait_for_others_nothing_is_done_later() -> None:
    alone = threading.Event()
    done: list[int] = []
    idle = Idle(alone.is_set)
    idle.start()
    for number in range(40):
        idle.call_later(NEVER, lambda number=number: done.append(number))  # type: ignore[misc]
    time.sleep(0.01)
    assert not done
    alone.set()
    wait_until(lambda: len(done) == 40, "all is done")
    assert done == list(range(40))
    idle.close()
