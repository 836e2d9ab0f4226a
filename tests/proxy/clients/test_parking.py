"""Waiting without a thread: what is parked is served when there is something to read, or leaves."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from cc_proxy.log import faults
from cc_proxy.proxy.clients.parking import Parking
from tests.proxy.conftest import Logged
from tests.wire.support import WAIT, is_silent, wait_until


class Guest:
    """Reads what comes, and stays until that is `go`."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.read: queue.SimpleQueue[tuple[bytes, str]] = queue.SimpleQueue()
        self.fails = False

    def fileno(self) -> int:
        return self.near.fileno()

    def on_readable(self) -> bool:
        if self.fails:
            self.fails = False
            raise KeyError("nobody expects it")
        data = self.near.recv(100)
        self.read.put((data, threading.current_thread().name))
        return data not in {b"go", b""}

    def close(self) -> None:
        self.near.close()
        self.far.close()


class Lot:
    """A parking lot that runs, and who has left it."""

    def __init__(self) -> None:
        self.left: queue.SimpleQueue[Guest] = queue.SimpleQueue()
        self.parking: Parking[Guest] = Parking(self.left.put)
        self.guests: list[Guest] = []

    def enter(self) -> Guest:
        guest = Guest()
        self.guests.append(guest)
        self.parking.park(guest)
        return guest


@pytest.fixture
def lot() -> Iterator[Lot]:
    lot = Lot()
    lot.parking.start()
    yield lot
    lot.parking.close()
    for guest in lot.guests:
        guest.close()


def test_what_has_something_to_read_is_served_where_it_is(lot: Lot) -> None:
    guests = [lot.enter() for _ in range(200)]
    for guest in guests:
        guest.far.sendall(b"x")
    for guest in guests:
        assert guest.read.get(timeout=WAIT) == (b"x", "parking")
    assert lot.left.empty()


def test_what_is_there_already_is_served_at_once(lot: Lot) -> None:
    guest = Guest()
    lot.guests.append(guest)
    guest.far.sendall(b"early")
    lot.parking.park(guest)
    assert guest.read.get(timeout=WAIT)[0] == b"early"


@pytest.mark.parametrize("how", ["asked to", "hung up"])
def test_what_does_not_stay_leaves_and_is_watched_no_more(lot: Lot, how: str) -> None:
    guest = lot.enter()
    if how == "asked to":
        guest.far.sendall(b"go")
    else:
        guest.far.shutdown(socket.SHUT_WR)
    assert lot.left.get(timeout=WAIT) is guest
    guest.read.get(timeout=WAIT)
    lot.parking.probe()
    wait_until(lot.parking.probe, "a turn")
    assert guest.read.empty()


def test_what_has_left_may_come_again(lot: Lot) -> None:
    guest = lot.enter()
    for _ in range(3):
        guest.far.sendall(b"go")
        assert lot.left.get(timeout=WAIT) is guest
        lot.parking.park(guest)
    guest.far.sendall(b"still here")
    while guest.read.get(timeout=WAIT)[0] != b"still here":
        pass


def test_error_that_nobody_expected_costs_nobody_else_anything(lot: Lot, logged: Logged) -> None:
    before = faults.counts().get("watching connections failed", 0)
    ill, well = lot.enter(), lot.enter()
    ill.fails = True
    ill.far.sendall(b"x")
    well.far.sendall(b"y")
    assert well.read.get(timeout=WAIT)[0] == b"y"
    assert ill.read.get(timeout=WAIT)[0] == b"x", "it is served in the next turn"
    assert faults.counts()["watching connections failed"] == before + 1


def test_what_cannot_be_watched_stays_the_callers(lot: Lot) -> None:
    guest = Guest()
    guest.close()
    with pytest.raises((OSError, ValueError)):
        lot.parking.park(guest)
    assert lot.left.empty()


def test_its_thread_answers_a_probe_unless_it_hangs(lot: Lot) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    class Hanging(Guest):
        def on_readable(self) -> bool:
            hangs.set()
            assert goes_on.wait(WAIT)
            return super().on_readable()

    assert lot.parking.probe()
    wait_until(lot.parking.probe, "it has answered")
    guest = Hanging()
    lot.guests.append(guest)
    wait_until(lot.parking.probe, "it has answered")
    guest.far.sendall(b"x")
    lot.parking.park(guest)
    assert hangs.wait(WAIT)
    lot.parking.probe()
    assert not lot.parking.probe()
    goes_on.set()
    wait_until(lot.parking.probe, "it has answered")


def test_at_the_end_nothing_is_touched_any_more() -> None:
    lot = Lot()
    lot.parking.start()
    guest = lot.enter()
    lot.parking.close()
    guest.far.sendall(b"too late")
    assert guest.read.empty()
    assert not is_silent(guest.near)
    guest.close()


def test_one_that_was_never_started_can_be_closed() -> None:
    Lot().parking.close()


def test_many_come_and_go_at_once(lot: Lot) -> None:
    def come_and_go() -> None:
        for _ in range(100):
            guest = Guest()
            with closing(guest):
                lot.parking.park(guest)
                guest.far.sendall(b"go")
                assert guest.read.get(timeout=WAIT)[0] == b"go"
                wait_until(lambda guest=guest: left(guest), "it has left")  # type: ignore[misc]

    gone: set[Guest] = set()
    lock = threading.Lock()

    def left(guest: Guest) -> bool:
        with lock:
            while not lot.left.empty():
                gone.add(lot.left.get())
            return guest in gone

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(gone) == 400
