"""No user takes more than its share: what is beyond is refused at once, and others notice nothing."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.users import ALICE, BOB, ROOT, needs_root
from tests.wire.support import (
    OK,
    READY,
    VERSIONED,
    RawClient,
    error_of,
    hello_data,
    in_pieces,
    is_silent,
    message,
    refused,
    request,
    unread_by_peer,
    wait_until,
)
from tests.wire.test_access import ACCESS, Town, town_of

pytestmark = needs_root

LIMITS = """
[limits]
request_bytes = 3_000_000
message_timeout = 2.0
[limits.user]
connections = 6
vms = 2
sessions = 3
commands = 2
request_bytes = 1_500_000
[vm]
ready_timeout = 0.6
"""
SHARES = ACCESS.replace("[vm]", LIMITS.rstrip()).replace("ready_timeout = 60\n", "")


@pytest.fixture
def town(open_dir: Path) -> Iterator[Town]:
    yield from town_of(open_dir, SHARES)


BYTES = "bytes of ids, and of messages that are on their way"


def reached(limit: int, what: str) -> bytes:
    return refused(f"the limit of {limit} {what} for one user is reached")


def test_connections(town: Town) -> None:
    alices = [town.client(ALICE) for _ in range(6)]
    beyond = town.client(ALICE)
    assert beyond.receive() == reached(6, "connections")
    assert beyond.is_closed_unanswered()
    assert town.client(BOB).ask("x") == refused("no payload named 'x'")
    alices[0].close()

    def is_served() -> bool:
        with closing(town.client(ALICE)) as client, suppress(BrokenPipeError):
            return client.ask("x") == refused("no payload named 'x'")
        return False

    wait_until(is_served, "there is room again")


def test_vms_and_an_id_that_is_taken_is_said_first(town: Town) -> None:
    client = town.client(ALICE)
    for container in ("one", "two"):
        town.pod(ALICE, container, client)
    vm = town.vm(ALICE)
    assert client.ask("hello", hello_data("three", vm)) == reached(2, "VMs")
    assert client.ask("hello", hello_data("two", vm)) == refused("two: container already registered")
    assert client.bye("one") == OK  # it lingers, and counts
    assert client.ask("hello", hello_data("three", vm)) == reached(2, "VMs")
    assert vm.was_not_dialled()
    town.pod(BOB, "three")


def test_vm_that_is_lost_counts_for_its_owner_until_all_is_delivered(town: Town) -> None:
    client, vm = town.client(ALICE), town.vm(ALICE)
    town.pod(ALICE, "kept", client)
    client.hello("lost", vm)
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    stream = client.allocate(1)
    for _ in range(200):
        vm.send_frame(stream.base, bytes(10_000))
    vm.hang_up()
    town.wire.wait_unregistered("lost")
    assert client.ask("hello", hello_data("new", town.vm(ALICE))) == reached(2, "VMs")
    town.pod(BOB, "new")
    for _ in range(200):
        assert stream.read_frame() == (stream.base, bytes(10_000))
    assert stream.at_end()


def test_sessions(town: Town) -> None:
    """On whichever VM; a refused one uses no number and sends no fd."""
    one, two = town.pod(ALICE, "one"), town.pod(ALICE, "two")
    streams = [one.allocate(1), two.allocate(2), one.allocate(1)]
    for client in (one, two):
        assert client.ask("allocateIO", {"nStreams": 1}) == reached(3, "sessions")
    assert town.pod(BOB, "bobs").allocate(1).base == 1
    streams[0].close()
    wait_until(lambda: town.status(ALICE)["vms"][0]["streams"]["sessions"] == 1, "it is given back")  # type: ignore[index]
    assert one.allocate(1).base == 3


def test_commands_that_wait(town: Town) -> None:
    client, vm = town.client(ALICE), town.vm(ALICE)
    client.hello("pod", vm)
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    waiting = [town.client(ALICE) for _ in range(2)]
    for other in waiting:
        assert other.attach("pod") == VERSIONED
        other.hyper()
    wait_until(lambda: _waiting_commands(town) == 2, "both wait")
    client.hyper()
    assert client.receive() == reached(2, "commands that wait")
    for _ in waiting:
        vm.acknowledge()
    assert [other.receive() for other in waiting] == [OK, OK]


def _waiting_commands(town: Town) -> int:
    count: int = town.status(ROOT)["vms"][0]["waitingCommands"]  # type: ignore[index]
    return count


def test_requests_that_do_not_arrive(town: Town) -> None:
    """Their bytes are counted as soon as they are announced, and given back when they are given up."""
    halves = [town.client(ALICE) for _ in range(2)]
    halves[0].send(struct.pack(">II", 1_000_000, 0) + b"{")
    wait_until(lambda: unread_by_peer(halves[0].sock) == 0, "it is begun")
    halves[1].send(struct.pack(">II", 1_000_000, 0) + b"{")
    assert halves[1].receive() == reached(1_500_000, BYTES)
    assert halves[1].is_closed_unanswered()
    long = message(b'{"id":"%s"}' % (b"x" * 1_000_000))
    bob, alice = town.client(BOB), town.client(ALICE)
    bob.send(long)
    assert error_of(bob.receive()).startswith("no payload named 'xxx")
    assert halves[0].is_closed_unanswered(), "it had its two seconds"
    alice.send(long)
    assert error_of(alice.receive()).startswith("no payload named 'xxx")


def test_who_writes_all_of_a_request_that_is_refused_reads_why(town: Town) -> None:
    half, whole = town.client(ALICE), town.client(ALICE)
    half.send(struct.pack(">II", 1_000_000, 0) + b"{")
    wait_until(lambda: unread_by_peer(half.sock) == 0, "it is begun")
    whole.send(message(b'{"id":"%s"}' % (b"x" * 1_000_000)))
    assert error_of(whole.receive()).startswith("the limit of 1500000 bytes of ids")
    assert whole.is_closed_unanswered()


def test_who_never_stops_writing_a_request_that_is_refused_is_hung_up_on(town: Town) -> None:
    endless = town.client(ALICE)
    endless.send(struct.pack(">II", 1_000_000, 0) + b"{")
    wait_until(lambda: unread_by_peer(endless.sock) == 0, "it is begun")
    other = town.client(ALICE)
    other.send(struct.pack(">II", 1_000_000, 0))
    with pytest.raises(BrokenPipeError):
        other.sock.sendall(bytes(64 * 1024 * 1024))
    assert other.receive() == reached(1_500_000, BYTES)


def test_ids_count_for_as_long_as_their_vms_are_there(town: Town) -> None:
    client, vm = town.client(ALICE), town.vm(ALICE)
    client.hello("x" * 700_000, vm)
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    other = town.client(ALICE)
    beyond = hello_data("y" * 700_000, town.vm(ALICE))
    assert error_of(other.ask("hello", beyond)).startswith("the limit of 1500000 bytes of ids")
    vm.hang_up()
    wait_until(lambda: not error_of(other.ask("hello", beyond)).startswith("the limit"), "they are forgotten")


def test_response_that_is_taken_byte_by_byte(town: Town) -> None:
    """Each byte is progress, as the kernel sees it; but the deadline is for a whole response."""
    client = town.client(ALICE)
    never = threading.Event()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - whichever of the two notices
        while True:
            with suppress(BlockingIOError):
                client.sock.send(request("x" * 200) * 100, socket.MSG_DONTWAIT)
            assert client.sock.recv(1)
            never.wait(0.001)


def test_hello_has_one_time_for_all_it_waits_for(town: Town) -> None:
    vm = town.vm(ALICE)
    with full(vm.listeners[1]):
        begun = time.monotonic()
        answer = error_of(town.client(ALICE).ask("hello", hello_data("pod", vm)))
        took = time.monotonic() - begun
    assert answer == f"ioSerial: cannot connect to {vm.io_path}: not accepted in time"
    assert took < 1.1


@contextmanager
def full(listener: socket.socket) -> Iterator[None]:
    """It accepts nobody, and somebody waits already."""
    listener.listen(0)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(listener.getsockname())
        yield


CROWD = SHARES.replace("connections = 6", "connections = 60\nrequest_rate = 16")


def test_connections_that_come_too_fast_are_served_later_and_others_meanwhile(open_dir: Path) -> None:
    """Forty in one go, and then eight a second."""
    for town in town_of(open_dir, CROWD):
        bob = town.client(BOB)
        assert bob.ask("x") == refused("no payload named 'x'")
        begun = time.monotonic()
        alices = [town.client(ALICE) for _ in range(46)]
        for alice in alices:
            alice.send(request("x"))
        assert bob.ask("x") == refused("no payload named 'x'")
        assert is_silent(alices[-1].sock)
        assert all(alice.receive() == refused("no payload named 'x'") for alice in alices)
        assert time.monotonic() - begun >= 0.6


#: So many requests are answered at once, and then sixteen a second.
AT_ONCE = 80


@pytest.fixture
def used_up(open_dir: Path) -> Iterator[tuple[Town, RawClient, RawClient]]:
    """A client of Alice, who has just asked for all that she may ask for at once, and one of Bob."""
    for town in town_of(open_dir, CROWD):
        bob, alice = town.client(BOB), town.client(ALICE)
        assert bob.ask("x") == refused("no payload named 'x'")
        alice.send(request("x") * AT_ONCE)
        for _ in range(AT_ONCE):
            assert alice.receive() == refused("no payload named 'x'")
        yield town, alice, bob


def test_requests_that_come_too_fast_are_answered_later_and_others_meanwhile(
    used_up: tuple[Town, RawClient, RawClient],
) -> None:
    _, alice, bob = used_up
    begun = time.monotonic()
    alice.send(request("x") * 20)
    assert bob.ask("x") == refused("no payload named 'x'")
    for _ in range(20):
        assert alice.receive() == refused("no payload named 'x'")
    assert time.monotonic() - begun >= 0.6


def send_in_pieces(client: RawClient, data: bytes) -> float:
    """Sends byte by byte, each once the one before has been read; returns the seconds that it took."""
    begun = time.monotonic()
    for piece in in_pieces(data, 1):
        client.send(piece)
        wait_until(lambda: unread_by_peer(client.sock) == 0, "it is read")
    return time.monotonic() - begun


def test_pieces_of_a_request_count_like_requests(used_up: tuple[Town, RawClient, RawClient]) -> None:
    _, alice, _ = used_up
    assert send_in_pieces(alice, request("x")) >= 0.6
    assert alice.receive() == refused("no payload named 'x'")


def test_pieces_of_a_refused_request_count_too(used_up: tuple[Town, RawClient, RawClient]) -> None:
    town, alice, _ = used_up
    alice.send(struct.pack(">II", 1_000_000, 0) + b"{")
    wait_until(lambda: unread_by_peer(alice.sock) == 0, "it is begun")
    other = town.client(ALICE)
    other.send(struct.pack(">II", 1_000_000, 0))
    assert other.receive() == reached(1_500_000, BYTES)
    assert send_in_pieces(other, bytes(20)) >= 0.6


def test_connections_that_wait_are_served_when_the_daemon_stops(open_dir: Path) -> None:
    for town in town_of(open_dir, CROWD.replace("request_rate = 16", "request_rate = 1")):
        bob, *served = town.client(BOB), town.client(ALICE), town.client(ALICE)
        waiting = town.client(ALICE)
        for client in (bob, *served):
            assert client.ask("x") == refused("no payload named 'x'")
        waiting.send(request("x"))
        assert is_silent(waiting.sock)
        town.wire.daemon.process.terminate()
        assert waiting.receive() == refused("no payload named 'x'")
