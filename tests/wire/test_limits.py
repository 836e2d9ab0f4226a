"""What clients announce, and what the operating system grants."""

from __future__ import annotations

import array
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.wire.daemon import PATIENT, Daemon, Wire, own_daemon
from tests.wire.support import (
    ACK,
    MIB,
    OK,
    command,
    error_of,
    frame,
    message,
    request,
    unread_by_peer,
    wait_until,
)

FD_LIMIT = 48


@pytest.fixture
def cramped(tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon that may have few files open."""
    limited = ["sh", "-c", f'ulimit -n {FD_LIMIT}; exec "$@"', "sh"]
    with own_daemon(tmp_sock_dir, prefix=limited, check=True) as wire:
        yield wire


def exhaust(wire: Wire, stack: ExitStack) -> None:
    """Connects until the daemon has no fd left, and some wait."""
    for _ in range(2 * FD_LIMIT):
        stack.callback(wire.daemon.connect().close_all)
    wait_until(lambda: wire.daemon.count_fds() >= FD_LIMIT - 2, "all fds are taken")


def test_announced_lengths_cost_no_memory(wire: Wire) -> None:
    before = wire.daemon.resident_bytes()
    clients = [wire.client() for _ in range(100)]
    for client in clients:
        client.send(message(b"{", length=MIB))
    wait_until(lambda: not any(unread_by_peer(client.sock) for client in clients), "the headers are read")
    assert wire.client().ask("x")
    assert wire.daemon.resident_bytes() - before < 20 * MIB


def test_half_a_header_and_silence_keeps_nobody_waiting(wire: Wire) -> None:
    pod = wire.pod()
    for size in range(1, 8):
        wire.client().send(request("x")[:size])
    assert pod.pings(wire.attached(pod))


def test_no_connection_is_refused_while_many_are_idle(wire: Wire) -> None:
    for _ in range(300):
        wire.client()
    assert error_of(wire.client().ask("x"))


def with_fds(data: bytes, sock: socket.socket, count: int) -> None:
    """Sends fds along, as only the daemon should; the data alone where the kernel allows nobody that."""
    fds = array.array("i", [sock.fileno()] * count)
    try:
        sent = sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    except PermissionError:
        sent = sock.send(data)
    assert sent == len(data)


def test_fds_that_clients_and_vms_send_along_are_not_kept(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.attached(pod)
    stream = pod.open(client=client)
    before = wire.daemon.count_fds()
    for _ in range(20):
        with_fds(request("x"), client.sock, 50)
        error_of(client.receive())
        with_fds(frame(stream.base, b"in"), stream.sock, 50)
        assert pod.vm.next_frame() == (stream.base, b"in")
        with_fds(frame(stream.base, b"out"), pod.vm.io, 50)
        assert stream.read_frame() == (stream.base, b"out")
        client.hyper("ping")
        pod.vm.read_command()
        with_fds(command(ACK), pod.vm.ctl, 50)
        assert client.receive() == OK
    assert wire.daemon.count_fds() <= before


def test_without_fds_it_does_not_spin_says_so_once_and_recovers(cramped: Wire) -> None:
    with ExitStack() as stack:
        exhaust(cramped, stack)
        before = cramped.daemon.cpu_seconds()
        threading.Event().wait(0.2)
        assert cramped.daemon.cpu_seconds() - before <= 0.1
        complaints = [
            line for line in cramped.daemon.log().splitlines() if "file" in line and "Too many" in line
        ]
        assert len(complaints) <= 1
    assert cramped.pod().pings()


def test_without_fds_allocate_io_is_refused_and_uses_no_number(cramped: Wire) -> None:
    pod = cramped.pod()
    with ExitStack() as stack:
        exhaust(cramped, stack)
        pod.client.send(request("allocateIO", {"nStreams": 1}) * 5)
        bases = []
        for _ in range(5):
            response = pod.client.receive()
            if b"ioBase" in response:
                bases.append(pod.client.receive_fd(0))
            else:
                error_of(response)
        assert len(bases) < 5
        assert pod.pings()
    wait_until(lambda: cramped.daemon.count_fds() < FD_LIMIT - 10, "there are fds again")
    assert pod.client.allocate().base == len(bases) + 1


def test_without_fds_hello_is_refused_and_the_id_stays_free(cramped: Wire) -> None:
    client, vm, container = cramped.client(), cramped.vm(), cramped.new_id()
    assert client.ask("x")
    with ExitStack() as stack:
        exhaust(cramped, stack)
        # Room for at most one of the two sockets.
        client.hello(container, vm)
        error_of(client.receive())
    wait_until(lambda: cramped.daemon.count_fds() < FD_LIMIT - 10, "there are fds again")
    assert cramped.pod(client, container).client.bye(container) == OK


def test_soft_fd_limit_is_raised_to_the_hard_one(tmp_sock_dir: Path) -> None:
    limited = ["sh", "-c", 'ulimit -S -n 64; exec "$@"', "sh"]
    with Daemon.configured(tmp_sock_dir, PATIENT, prefix=limited) as daemon:
        soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > 64
