"""The machine runs short, or kills: what is refused, what goes on, and that afterwards all is as before."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from cc_proxy.log import journal
from tests.wire.daemon import PATIENT, Daemon, Pod, Wire
from tests.wire.support import (
    OK,
    RawClient,
    at_end,
    error_of,
    frame,
    is_silent,
    read_exact,
    refused,
    wait_until,
)

MIB = 1_048_576
PIDS = Path("/sys/fs/cgroup/pids")
FRAME = frame(1, bytes(range(250)) * 40)


@contextmanager
def running(directory: Path, tables: str = PATIENT, *, prefix: list[str] | None = None) -> Iterator[Wire]:
    """A daemon of one's own, which has to be at rest again at the end."""
    with (
        Daemon.configured(directory, tables, prefix=prefix or []) as daemon,
        closing(Wire(daemon, directory)) as wire,
    ):
        yield wire
        wire.close()
        daemon.check()
        assert daemon.stop() == 0


def take_all_threads(wire: Wire, stack: ExitStack) -> str:
    """Have clients begin messages, which takes a thread each; returns what the last one is told."""
    clients: list[RawClient] = []

    def refused_ones() -> list[RawClient]:
        clients.append(wire.daemon.connect())
        stack.callback(clients[-1].close_all)
        with suppress(BrokenPipeError):  # turned away already
            clients[-1].send(b"\0")
        return [client for client in clients if not is_silent(client.sock)]

    wait_until(lambda: bool(refused_ones()), "there is no thread for one")
    return error_of(next(client for client in clients if not is_silent(client.sock)).receive())


# Threads and memory ---------------------------------------------------------------------------------------


@pytest.fixture
def few_threads() -> Iterator[list[str]]:
    """What to put in front of a program so that all its processes and threads together are at most 40."""
    group = PIDS / f"cc-proxy-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs root and the pids controller of cgroup v1")
    (group / "pids.max").write_text("40")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
    group.rmdir()


def test_no_more_threads(tmp_sock_dir: Path, few_threads: list[str]) -> None:
    with running(tmp_sock_dir, prefix=few_threads) as wire:
        pod = wire.pod()
        with ExitStack() as stack:
            assert take_all_threads(wire, stack) == "the daemon cannot start another thread"
        wait_until(lambda: wire.daemon.count_threads() < 10, "they have gone")
        with ExitStack() as stack:
            client = wire.client()
            client.hello("late", vm := wire.vm())
            vm.accept()
            take_all_threads(wire, stack)
            vm.say(8)
            assert error_of(client.receive()) == "the daemon is short of resources: can't start new thread"
            assert vm.is_hung_up()
            pod.client.hyper("ping")
            assert pod.client.receive() == refused("the daemon cannot start another thread")
        wait_until(lambda: wire.daemon.count_threads() < 10, "they have gone")
        assert pod.pings(), "the connection has lived on"
        wire.pod(container="late")


def test_no_more_memory(tmp_sock_dir: Path) -> None:
    """Of address space there is 40 MiB more than it takes to start."""
    with running(tmp_sock_dir) as wire:
        status = Path(f"/proc/{wire.daemon.pid}/status").read_text()
        (size,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    limited = ["sh", "-c", f'ulimit -v {size + 40 * 1024}; exec "$@"', "sh"]
    with running(tmp_sock_dir, prefix=limited) as wire:
        pod = wire.pod()
        stream = pod.open(1)
        with ExitStack() as stack:
            assert take_all_threads(wire, stack) == "the daemon cannot start another thread"
        pod.vm.send_frame(stream.base, b"out")
        assert stream.read_frame().payload == b"out"
        assert pod.pings()
        wait_until(lambda: wire.daemon.count_threads() < 10, "they have gone")
        assert Pod("late", wire.pod(container="late").client, pod.vm).container == "late"


# The disk -------------------------------------------------------------------------------------------------


def mounted(directory: Path, size: str) -> list[str]:
    """What to put in front of a program so that it alone has a file system of that size there."""
    mount = f'mount -t tmpfs -o size={size} none {directory} && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("needs root")
    return prefix


def test_full_disk(tmp_sock_dir: Path) -> None:
    """The VM waits for the client that does not read, other VMs do not, and nothing is lost."""
    spool = tmp_sock_dir / "spool"
    spool.mkdir()
    tables = f'{PATIENT}[spool]\ndirectory = "{spool}"\n'
    with running(tmp_sock_dir, tables, prefix=mounted(spool, "2m")) as wire:
        pod, other = wire.pod(), wire.pod()
        stream, theirs = pod.open(1), other.open(1)
        pod.vm.io.setblocking(False)
        sent = 0
        while "the VM is not read until its client reads" not in wire.daemon.log():
            try:
                sent += pod.vm.io.send(FRAME[sent % len(FRAME) :])
            except BlockingIOError:
                assert other.pings()
        assert "No space left on device" in wire.daemon.log()
        assert sent > 2 * MIB
        other.vm.send_frame(theirs.base, b"out")
        assert theirs.read_frame().payload == b"out"
        assert pod.pings()
        whole = FRAME * (sent // len(FRAME) + 1)
        assert read_exact(stream.sock, sent) == whole[:sent]
        pod.vm.io.setblocking(True)
        pod.vm.io.sendall(whole[sent:] + frame(stream.base, b"after"))
        read_exact(stream.sock, len(whole) - sent)
        assert stream.read_frame().payload == b"after"


# The log --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_journal", [False, True], ids=["pipe", "journal"])
def test_log_that_nobody_reads(tmp_sock_dir: Path, is_journal: bool) -> None:
    """64 KiB fit into a pipe, and then 4 MiB of lines wait; lines beyond that are counted."""
    log = tmp_sock_dir / "log"
    os.mkfifo(log)
    tables = PATIENT + '[log]\nlevel = "debug"\n'
    prefix = []
    if is_journal:
        if journal.is_there():
            pytest.skip("there is a real one, and tests/packaging has one that blocks")
        prefix = ["env", f"JOURNAL_STREAM={log.stat().st_dev}:{log.stat().st_ino}"]
    with (
        open(os.open(log, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as reader,
        Daemon.configured(tmp_sock_dir, tables, prefix=prefix) as daemon,
        closing(Wire(daemon, tmp_sock_dir)) as wire,
    ):
        pod = wire.pod()
        clients = [wire.client() for _ in range(10)]
        for _ in range(600):
            for client in clients:
                client.send(b"\0\0\0\x02\0\0\0\0{}")
            for client in clients:
                assert error_of(client.receive()) == "no 'id' field in request"
        assert pod.pings()
        said = bytearray()

        def read_on() -> bool:
            said.extend(reader.read(1 << 20) or b"")
            assert wire.client().ask("x")
            return b"dropped_before" in said

        wait_until(read_on, "the next line says how many were dropped")
        assert said.startswith(b"<") == is_journal
        assert pod.pings()
        assert daemon.stop() == 0


# Kills ----------------------------------------------------------------------------------------------------


def test_killed_and_started_again(tmp_sock_dir: Path) -> None:
    """VMs and clients see it at once, the spool's room is free again, and the socket is taken over."""
    with Daemon.configured(tmp_sock_dir) as daemon:
        with closing(Wire(daemon, tmp_sock_dir)) as wire:
            pod = wire.pod()
            stream = pod.open(1)
            for _ in range(3 * MIB // len(FRAME)):
                pod.vm.io.sendall(FRAME)
            wait_until(lambda: spooled(daemon) > 2 * MIB, "output is spooled")
            waiting = wire.attached(pod)
            waiting.hyper("ping")
            pod.vm.read_command()
            daemon.kill()
            assert at_end(pod.vm.ctl)
            assert at_end(waiting.sock)
            with suppress(ConnectionResetError):  # what it had sent was not all read
                assert at_end(pod.vm.io)
            size = 0
            while piece := stream.sock.recv(1 << 20):
                assert piece == (FRAME * 60)[size % len(FRAME) :][: len(piece)]
                size += len(piece)
            assert list(tmp_sock_dir.glob("cc-proxy-*")) == []
        assert daemon.socket_path.exists()
    with running(tmp_sock_dir) as wire:
        assert wire.pod(container=pod.container).pings()


def spooled(daemon: Daemon) -> int:
    """Bytes of the disk in files without a name that the daemon has open."""
    fds = Path(f"/proc/{daemon.pid}/fd")
    return sum(fd.stat().st_blocks * 512 for fd in fds.iterdir() if os.readlink(fd).endswith("(deleted)"))


def test_thousands_of_clients_die_at_once(tmp_sock_dir: Path) -> None:
    """Some in the middle of a message, some with an answer on its way, some with streams."""
    with running(tmp_sock_dir) as wire:
        pod = wire.pod()
        stream = pod.open(1)
        crowd: list[RawClient] = []
        for number in range(2_000):
            client = wire.daemon.connect()
            crowd.append(client)
            client.attach(pod.container)
            if number % 3 == 0:
                client.allocate(1).send(b"typed")
            elif number % 3 == 1:
                client.send(b"\0\0\0\x09")
            else:
                client.send(b"\0\0\0\x02\0\0\0\0{}")
        for client in crowd:
            client.close_all()
        assert pod.pings()
        pod.vm.send_frame(stream.base, b"out")
        assert stream.read_frame().payload == b"out"
        wait_until(lambda: wire.daemon.count_threads() < 10, "they have gone")
        assert wire.attached(pod).ask("x")
        assert is_silent(stream.sock)
        assert pod.client.bye(pod.container) == OK
