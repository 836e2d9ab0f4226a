"""The daemon as a process: how it is started, and what must be true of it after every test."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bench.adopted import Adopted, adopting_orphans, reap
from cc_proxy.api.status import shorten
from tests.wire.successors import ENDED_FROM_THE_START, Manager
from tests.wire.support import (
    EXECCMD,
    OK,
    READY,
    VERSIONED,
    WAIT,
    FakeVm,
    RawClient,
    Stream,
    refused,
    wait_until,
)

_STACK = '"message": "stack"'

CHECKOUT = Path(__file__).parent.parent.parent
COMMAND_LINE = [sys.executable, "-m", "cc_proxy"]

# Nothing of this passes in a test, however slow the machine is.
PATIENT = """
[vm]
ready_timeout = 60
ready_ping_after = 50
command_timeout = 60
bye_linger = 60
[stdin]
echo_timeout = 60
"""
# For tests of what happens when a time has passed. Logs all there is to log.
HASTY = """
[log]
level = "console"
[vm]
ready_timeout = 1.0
ready_ping_after = 0.3
command_timeout = 0.5
bye_linger = 0.4
[stdin]
echo_timeout = 0.1
"""
BRIEF = PATIENT.replace("ready_timeout = 60", "ready_timeout = 0.4")
UNPACED = PATIENT.replace("[stdin]", "[stdin]\nwindow = 0")


def environment() -> dict[str, str]:
    """Without what would change the daemon. Sockets that it forgets to close show in its log."""
    prefixes = ("LISTEN_", "NOTIFY_SOCKET", "CC_PROXY_", "JOURNAL_STREAM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return kept | {"PYTHONWARNINGS": "always::ResourceWarning"}


def write_config(directory: Path, socket_path: Path, tables: str = PATIENT) -> Path:
    path = directory / "cc-proxy.toml"
    spool = "" if "[spool]" in tables else f'[spool]\ndirectory = "{directory}"\n'
    log = "" if "[log]" in tables else "[log]\n"
    text = f'socket_path = "{socket_path}"\n{log}{tables}\n{spool}'
    path.write_text(text.replace("[log]\n", '[log]\nformat = "json"\n'))
    return path


def run_to_end(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """For daemons that are to give up."""
    return subprocess.run(
        [*COMMAND_LINE, *map(str, arguments)],
        cwd=CHECKOUT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def start(
    arguments: Sequence[str | Path],
    log_path: Path,
    *,
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    more: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """For daemons that are to serve. All they say goes into a file, which never blocks them."""
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [*prefix, *COMMAND_LINE, *map(str, arguments)],
            cwd=CHECKOUT,
            env=environment() | (more or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=pass_fds,
        )


class Daemon:
    """A running daemon."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str | Path],
        *,
        socket_path: Path,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.socket_path = socket_path
        self.log_path = directory / "log"
        self._checked = 0
        self.process: subprocess.Popen[bytes] | Adopted = self._start(arguments, prefix, pass_fds)
        try:
            self._wait_for_socket()
            self.fds, self.threads = self._at_rest()
        except BaseException:
            self.kill()
            raise

    def _start(
        self, arguments: Sequence[str | Path], prefix: Sequence[str], pass_fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        return start(arguments, self.log_path, prefix=prefix, pass_fds=pass_fds)

    def replace(self) -> None:
        """Have another process go on with everything; returns when it does."""
        with self.being_replaced():
            self.process.send_signal(signal.SIGUSR2)

    @contextmanager
    def being_replaced(self) -> Iterator[None]:
        """Expects that another process goes on with everything at the end, and has been told to meanwhile."""
        before = self.process
        with adopting_orphans() as orphans:
            yield
            assert before.wait(WAIT) == 0
        with closing(self.connect()) as client:
            self.process = Adopted(json.loads(client.ask("status"))["data"]["pid"])
        assert self.pid != before.pid
        reap(orphans - {self.pid}, WAIT)

    @classmethod
    def configured(cls, directory: Path, tables: str = PATIENT, *, prefix: Sequence[str] = ()) -> Self:
        socket_path = directory / "proxy.sock"
        config = write_config(directory, socket_path, tables)
        return cls(directory, ["--config", config], socket_path=socket_path, prefix=prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self) -> RawClient:
        return RawClient(self.socket_path)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def count_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def count_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def check(self) -> None:
        """It lives, serves, has given back what it used, and logged nothing but its events."""
        assert self.process.poll() is None, f"the daemon ended\n{self.log()[-4000:]}"
        assert self._serves()
        wait_until(lambda: self.count_fds() <= self.fds, "fds given back", 5)
        wait_until(lambda: self.count_threads() <= self.threads, "threads given back", 5)
        self.check_log()

    def check_log(self) -> None:
        with self.log_path.open("rb") as log:
            log.seek(self._checked)
            lines = log.read().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        self._checked += sum(map(len, complete))
        for line in complete:
            assert b"Traceback" not in line, line.decode().replace("\\n", "\n")
            assert line.startswith(b"{"), f"not an event: {b''.join(complete).decode()[:4000]}"
            json.loads(line)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    def _wait_for_socket(self) -> None:
        for _ in range(2000):
            try:
                assert self._serves()
            except (FileNotFoundError, ConnectionError):
                pass
            else:
                return
            try:
                self.process.wait(0.005)
            except subprocess.TimeoutExpired:
                continue
            break
        raise AssertionError(f"no daemon: {self.log()}")

    def _serves(self) -> bool:
        client = self.connect()
        try:
            return client.ask("health") == refused("no payload named 'health'")
        finally:
            client.close()

    def _at_rest(self) -> tuple[int, int]:
        """Fds and threads without any connection. One thread may linger, that which served the first."""
        samples: list[tuple[int, int]] = []

        def is_steady() -> bool:
            samples.append((self.count_fds(), self.count_threads()))
            return len(samples) > 10 and len(set(samples[-10:])) == 1

        wait_until(is_steady, "a daemon at rest")
        return samples[-1]


class ManagedDaemon(Daemon):
    """One that a service manager starts, and starts again."""

    def __init__(self, directory: Path, tables: str = PATIENT, *, most_fds: int = 8) -> None:
        self.manager = Manager(directory, most_fds)
        self._arguments: list[str | Path] = [
            "--config",
            write_config(directory, directory / "proxy.sock", tables),
        ]
        super().__init__(directory, self._arguments, socket_path=directory / "proxy.sock")

    def _start(
        self, arguments: Sequence[str | Path], prefix: Sequence[str], pass_fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        manager = self.manager
        manager.catch_up()
        fds = [fd for _, fd in manager.fds]
        return start(
            arguments,
            self.log_path,
            prefix=[*manager.prefix(), *prefix],
            pass_fds=fds,
            more=manager.environment,
        )

    def replace(self) -> None:
        """Have it end, and start it again with what is kept."""
        self.leave_all()
        self.start_again()

    def crash(self) -> None:
        """Have it killed, and start it again with what is kept."""
        self.die()
        self.start_again()

    def die(self) -> None:
        """Have it killed, as one that was well."""
        self.process.kill()
        self.process.wait(WAIT)
        self.manager.catch_up()
        if self.manager.keeps("cc-proxy-table"):
            self.manager.table().be_well()

    def start_and_kill(self, seconds: float) -> None:
        """Start the next process, and kill it after a while, as far as it has come by then."""
        process = self._start(self._arguments, (), ())
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait(WAIT)

    def leave_all(self) -> None:
        """Have it end, and leave all to the next process."""
        self.process.send_signal(signal.SIGUSR2)
        assert self.process.wait(WAIT) == os.EX_TEMPFAIL

    def start_again(self, prefix: Sequence[str] = ()) -> None:
        """Start the next process with what is kept."""
        self.process = self._start(self._arguments, prefix, ())
        self._wait_for_socket()

    def start_and_end(self) -> int:
        """Start the next process and have it end before it can be ready; returns its exit status."""
        self.process = self._start(self._arguments, ENDED_FROM_THE_START, ())
        return self.process.wait(WAIT)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Have it end for good. One that has just taken over would leave all to the next process instead."""
        before = self.log().count(_STACK)
        self.process.send_signal(signal.SIGUSR1)  # which is seen after that
        wait_until(lambda: self.log().count(_STACK) > before, "it looks for signals")
        return super().stop(number)

    def kill(self) -> None:
        try:
            super().kill()
        finally:
            self.manager.close()


@dataclass
class Pod:
    """A registered VM and the client that said hello for it."""

    container: str
    client: RawClient
    vm: FakeVm

    def open(self, streams: int = 2, *, client: RawClient | None = None) -> Stream:
        """A client's streams, and a process on them. `client` has to be attached."""
        client = client or self.client
        stream = client.allocate(streams)
        self.start(stream, client)
        return stream

    def start(self, stream: Stream, client: RawClient | None = None) -> None:
        """Start a process on a client's streams."""
        client = client or self.client
        process = {"terminal": False, "stdio": stream.base, "stderr": stream.base + 1, "args": ["x"]}
        client.hyper("execcmd", json.dumps({"container": self.container, "process": process}))
        assert self.vm.acknowledge().code == EXECCMD
        assert client.receive() == OK

    def pings(self, client: RawClient | None = None) -> bool:
        """The VM takes a command, after what clients that are gone left behind, and its answer arrives."""
        client = client or self.client
        number = str(next(_numbers))
        client.hyper("ping", number)
        while self.vm.acknowledge().payload != number.encode():
            pass
        return client.receive() == OK


_numbers = itertools.count(1)


@dataclass
class Wire:
    """Clients and VMs of one daemon, all gone at the end of a test."""

    daemon: Daemon
    directory: Path
    _stack: ExitStack = field(default_factory=ExitStack)

    def new_id(self) -> str:
        return f"c{next(_numbers)}"

    def client(self) -> RawClient:
        client = self.daemon.connect()
        self._stack.callback(client.close_all)
        return client

    def vm(self) -> FakeVm:
        vm = FakeVm(self.directory, f"vm{next(_numbers)}")
        self._stack.callback(vm.close)
        return vm

    def pod(self, client: RawClient | None = None, container: str | None = None) -> Pod:
        """A VM that said READY, and a client that is attached to it."""
        pod = Pod(container or self.new_id(), client or self.client(), self.vm())
        pod.client.hello(pod.container, pod.vm)
        pod.vm.accept()
        pod.vm.say(READY)
        assert pod.client.receive() == VERSIONED
        return pod

    def attached(self, pod: Pod) -> RawClient:
        client = self.client()
        assert client.attach(pod.container) == VERSIONED
        return client

    def is_registered(self, container: str) -> bool:
        """Whether there is a VM behind the id: one that has gone without bye keeps it."""
        client = self.daemon.connect()
        try:
            if client.attach(container) == refused(f"unknown containerID: {container}"):
                return False
            vms = json.loads(client.ask("status"))["data"]["vms"]
        finally:
            client.close()
        states = {vm["state"] for vm in vms if vm["id"] == shorten(container)}
        return "up" in states  # one that lingers after bye, or is lost, may have the same id

    def is_taken(self, container: str) -> bool:
        """Also by a hello that has not ended yet. Asked with one that fails at once."""
        client = self.daemon.connect()
        data = {"containerId": container, "ctlSerial": "relative", "ioSerial": "relative"}
        try:
            return client.ask("hello", data) == refused(f"{container}: container already registered")
        finally:
            client.close()

    def wait_unregistered(self, container: str) -> None:
        wait_until(lambda: not self.is_registered(container), f"the VM of {container} has gone")

    def close(self) -> None:
        self._stack.close()


@contextmanager
def own_daemon(
    directory: Path,
    tables: str = PATIENT,
    *,
    prefix: Sequence[str] = (),
    check: bool = False,
    start: Callable[[Path, str], Daemon] | None = None,
) -> Iterator[Wire]:
    """A daemon that no other test uses. With `check` it has to end as it began, and with 0.

    `start` starts it, for those that cannot have a `prefix`.
    """
    with start(directory, tables) if start else Daemon.configured(directory, tables, prefix=prefix) as daemon:
        wire = Wire(daemon, directory)
        try:
            yield wire
        finally:
            wire.close()
        if check:
            daemon.check()
            status = daemon.stop()
            assert status == 0, f"the daemon ended with status {status}\n{daemon.log()[-4000:]}"
