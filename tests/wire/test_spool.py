"""The bound that the settings put on what waits for clients that do not read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.wire.daemon import PATIENT, Daemon, Wire, own_daemon
from tests.wire.support import MIB, frame, in_background, read_exact, unread_by_peer, wait_until

COUNT = 800
CHUNK = b"0123456789" * 1_000


def everything(base: int) -> bytes:
    return b"".join(frame(base, b"%08d" % number + CHUNK) for number in range(COUNT))


@pytest.fixture(params=["session_limit = 500_000", "session_limit = 0", "total_limit = 500_000"])
def tight(request: pytest.FixtureRequest, tmp_sock_dir: Path) -> Iterator[Wire]:
    with own_daemon(
        tmp_sock_dir, PATIENT + f'[spool]\ndirectory = "{tmp_sock_dir}"\n{request.param}\n', check=True
    ) as wire:
        yield wire


def test_over_the_limit_nothing_is_lost_and_commands_and_other_vms_go_on(tight: Wire) -> None:
    pod, other = tight.pod(), tight.pod()
    slow, quick = pod.open(), other.open()
    sent = everything(1)
    before = tight.daemon.resident_bytes()
    with in_background(lambda: pod.vm.io.sendall(sent)):
        slow.sock.recv(1, socket.MSG_PEEK)  # it is on its way
        for number in range(20):
            assert pod.pings()
            other.vm.send_frame(1, b"%d" % number)
            assert quick.read_frame() == (1, b"%d" % number)
        assert tight.daemon.resident_bytes() - before < 4 * MIB
        assert read_exact(slow.sock, len(sent)) == sent
    pod.vm.send_frame(1, b"and on")
    assert slow.read_frame() == (1, b"and on")


def test_over_the_limit_a_client_that_goes_lets_its_vm_go_on(tight: Wire) -> None:
    pod = tight.pod()
    slow, other = pod.open(client=tight.attached(pod)), pod.open(client=tight.attached(pod))
    with in_background(lambda: pod.vm.io.sendall(everything(1) + frame(other.base, b"out"))):
        slow.sock.recv(1, socket.MSG_PEEK)
        slow.close()
        assert other.read_frame() == (other.base, b"out")


def test_over_the_limit_a_client_that_takes_no_more_lets_its_vm_go_on(tight: Wire) -> None:
    pod = tight.pod()
    slow, other = tight.attached(pod).allocate(), tight.attached(pod).allocate()
    with in_background(lambda: pod.vm.io.sendall(everything(1) + frame(other.base, b"out"))):
        slow.sock.recv(1, socket.MSG_PEEK)
        slow.sock.shutdown(socket.SHUT_RD)
        assert other.read_frame() == (other.base, b"out")
    assert json.loads(tight.client().ask("status"))["data"]["spooled"] == 0
    slow.send(b"it may still send")
    assert pod.vm.read_frame() == (slow.base, b"it may still send")


def test_client_that_takes_no_more_keeps_nothing_of_a_vm_that_died(tight: Wire) -> None:
    pod = tight.pod()
    slow = tight.attached(pod).allocate()
    pod.vm.io.setblocking(False)
    sent = memoryview(everything(1))
    with suppress(BlockingIOError):
        while True:
            sent = sent[pod.vm.io.send(sent) :]
    pod.vm.hang_up()
    slow.sock.shutdown(socket.SHUT_RD)

    def vms() -> object:
        return [vm for vm in json.loads(tight.client().ask("status"))["data"]["vms"] if vm["state"] != "gone"]

    wait_until(lambda: not vms(), "its thread has ended")
    with pytest.raises(BrokenPipeError):
        slow.send(b"in")


def test_over_the_limit_a_vm_that_dies_loses_only_itself_and_its_client_gets_all(tight: Wire) -> None:
    pod, other = tight.pod(), tight.pod()
    slow = pod.open()
    pod.vm.io.setblocking(False)
    sent = everything(1)
    size = 0
    with suppress(BlockingIOError):
        while True:
            size += pod.vm.io.send(sent[size:])
    assert size < len(sent)
    pod.vm.hang_up()
    assert other.pings()
    whole = size - size % len(frame(1, b"%08d" % 0 + CHUNK))
    assert read_exact(slow.sock, whole) == sent[:whole]
    while rest := slow.sock.recv(100_000):
        assert len(rest) < len(CHUNK) + 20


def test_disk_holds_no_more_than_the_limit_for_clients_that_are_always_behind(tmp_sock_dir: Path) -> None:
    """What they have read is given back, too, and `status` tells what is held."""
    limit = 4 * MIB
    spool = f'[spool]\ndirectory = "{tmp_sock_dir}"\nsession_limit = {limit // 2}\ntotal_limit = {limit}\n'
    with own_daemon(tmp_sock_dir, PATIENT + spool, check=True) as wire:
        pods = [wire.pod() for _ in range(4)]
        slow = [pod.client.allocate().sock for pod in pods]
        piece = frame(1, bytes(10_000)) * 50
        for pod in pods:
            pod.vm.io.sendall(piece)  # as much as its client is behind from now on
        for _ in range(15):
            for pod, client in zip(pods, slow, strict=True):
                pod.vm.io.sendall(piece)
                wait_until(lambda: unread_by_peer(pod.vm.io) == 0, "it is read")  # noqa: B023
                read_exact(client, len(piece))
            status = json.loads(wire.client().ask("status"))["data"]
            assert 0 < on_disk(wire.daemon, tmp_sock_dir) <= status["spooled"] <= limit
            assert status["users"][0]["spooled"] == status["spooled"]
        for client in slow:
            assert read_exact(client, len(piece)) == piece


def on_disk(daemon: Daemon, directory: Path) -> int:
    """What the file system has given out for files of the daemon's without a name."""
    held = 0
    for fd in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if str(fd.readlink()).startswith(f"{directory}/") and "(deleted)" in str(fd.readlink()):
                held += fd.stat().st_blocks * 512
    return held


def test_directory_that_is_gone_costs_no_byte(tmp_sock_dir: Path) -> None:
    directory = tmp_sock_dir / "spool"
    directory.mkdir()
    spool = f'[spool]\ndirectory = "{directory}"\n'
    with own_daemon(tmp_sock_dir, PATIENT + spool, check=True) as wire:
        directory.rmdir()
        pod, other = wire.pod(), wire.pod()
        slow = pod.open()
        sent = everything(1)
        with in_background(lambda: pod.vm.io.sendall(sent)):
            slow.sock.recv(1, socket.MSG_PEEK)
            assert pod.pings()
            assert other.pings()
            assert read_exact(slow.sock, len(sent)) == sent


def test_nothing_is_ever_seen_in_the_directory(tmp_sock_dir: Path) -> None:
    directory = tmp_sock_dir / "spool"
    directory.mkdir()
    spool = f'[spool]\ndirectory = "{directory}"\n'
    with own_daemon(tmp_sock_dir, PATIENT + spool, check=True) as wire:
        pod = wire.pod()
        pod.open()
        pod.vm.io.sendall(everything(1))
        assert list(directory.iterdir()) == []
