"""Starts, watches and ends the processes that are measured, and those that measure them."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from bench.adopted import Adopted, adopting_orphans, reap
from cc_proxy.api import Client

_CHECKOUT = Path(__file__).parent.parent
_START_TIMEOUT = 20.0
_STOP_TIMEOUT = 10.0
#: Seconds after which an idle thread of the daemon has certainly ended.
_LINGERING = 0.5
#: Seconds to wait for the result of an order; a generator gives up before that.
_ORDER_TIMEOUT = 120.0
#: Environment variables that would influence the daemon begin with these.
_FOREIGN = ("LISTEN_", "NOTIFY_SOCKET", "CC_PROXY_", "JOURNAL_STREAM")


class BenchError(Exception):
    """A measurement that failed, or could not be made; the text says which and why."""


class Child:
    """A Python module in a process of its own, which does not outlive the benchmark."""

    def __init__(self, name: str, module: str, *arguments: str, **options: Any) -> None:
        self.name = name
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        self.process: subprocess.Popen[bytes] | Adopted = subprocess.Popen(
            [sys.executable, "-m", "bench.launch", str(os.getpid()), module, *arguments],
            cwd=_CHECKOUT,
            env=environment,
            process_group=0,  # Ctrl-C is for the benchmark, which then ends the others one by one
            **options,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it. May be called again."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process.pid)

    def wait_for_socket(self, path: str) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not _is_served(path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.name} does not start")
            time.sleep(0.01)


class Service(Child):
    """A process that serves on a socket, and logs to a file."""

    def __init__(self, name: str, directory: Path, module: str, *arguments: str) -> None:
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            super().__init__(
                name, module, *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def complaints(self, lines: int = 12) -> list[str]:
        """End it; returns the last lines of its log, without mere information."""
        self.stop()
        log = self._log.read_text(errors="replace").splitlines()
        return [line for line in log if '"level": "INFO"' not in line][-lines:]


class Daemon(Service):
    """A cc-proxy with the default settings, except for its paths and what `settings` say."""

    def __init__(self, name: str, directory: Path, settings: str = "") -> None:
        self.path = str(directory / f"{name}.sock")
        self.config = directory / f"{name}.toml"
        self._directory = directory
        self.configure(settings)
        super().__init__(
            name, directory, "cc_proxy", "--config", str(self.config), "--socket-path", self.path
        )
        try:
            self.wait_for_socket(self.path)
        except BaseException:
            self.stop()
            raise

    def configure(self, settings: str) -> None:
        """Write its settings file. `settings` is TOML text that goes on inside the table [spool]."""
        self.config.write_text(f'[spool]\ndirectory = "{self._directory}"\n{settings}')

    def replace(self) -> None:
        """Have another process take over everything; returns once it has. Raises `BenchError`.

        If the benchmark is killed, that process outlives it.
        """
        with adopting_orphans() as orphans:
            self.process.send_signal(signal.SIGUSR2)
            if status := self.process.wait(_START_TIMEOUT):
                raise BenchError(f"{self.name} has ended with status {status} and was not replaced")
        with Client(self.path, timeout=_START_TIMEOUT) as client:
            self.process = Adopted(client.status().pid)
        reap(orphans - {self.process.pid}, _STOP_TIMEOUT)

    def log(self) -> list[dict[str, Any]]:
        """Return what it has logged so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def connections(self) -> int:
        """Return how many connections and VMs there are, without the connection that asks."""
        with Client(self.path, timeout=_START_TIMEOUT) as client:
            return sum(user.connections + user.vms for user in client.status().users) - 1

    def resident_bytes(self) -> int:
        return self.memory()["Rss"]

    def memory(self) -> dict[str, int]:
        """Return numbers of bytes by their names in smaps_rollup: `Rss`, `Pss` and others."""
        # `statm` is quicker, but on newer kernels it is wrong by up to some hundred kB.
        lines = (line.split() for line in self._proc("smaps_rollup").read_text().splitlines()[1:])
        return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines}

    def settle(self, seconds: float = 5.0, staying: int = 0) -> None:
        """Wait until everything that was closed is gone, so that this does not disturb the next measurement.

        `staying` is how many connections and VMs were not closed. Raises `BenchError` if more stay.
        """
        deadline = time.monotonic() + seconds
        while self.connections() > staying:
            if time.monotonic() > deadline:
                left = self.connections() - staying
                raise BenchError(f"{self.name} keeps {left} connections or VMs that have ended")
            time.sleep(0.005)
        time.sleep(_LINGERING)  # until the thread that has just answered has ended, too

    def count_threads(self) -> int:
        return len(os.listdir(self._proc("task")))

    def count_fds(self) -> int:
        return len(os.listdir(self._proc("fd")))

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.process.pid}/{name}")


class Relay(Service):
    """The yardstick (`bench.relay`)."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "relay.sock")
        super().__init__("relay", directory, "bench.relay", self.path)
        try:
            self.wait_for_socket(self.path)
        except BaseException:
            self.stop()
            raise


class Worker(Child):
    """A generator process. `begin` gives it an order, and `gather` takes the result."""

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        super().__init__(name, module, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def begin(self, order: str, **arguments: Any) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"do": order, "with": arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"{self.name} has ended") from None

    def call(self, order: str, **arguments: Any) -> Any:
        """Give an order and wait for its result. Raises `BenchError`."""
        self.begin(order, **arguments)
        return gather(self)[0]

    def take_answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer["result"]


def gather(*workers: Worker) -> Sequence[Any]:
    """Wait until all workers have carried out their orders; returns the results, in the workers' order.

    Raises `BenchError` as soon as one fails: the others may now wait for it in vain.
    """
    waiting = {worker.process.stdout.fileno(): worker for worker in workers if worker.process.stdout}
    results: dict[Worker, Any] = {}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        ready = poll.poll(_ORDER_TIMEOUT * 1000)
        if not ready:
            raise BenchError(f"{', '.join(worker.name for worker in waiting.values())}: no answer")
        for fd, _ in ready:
            worker = waiting.pop(fd)
            poll.unregister(fd)
            results[worker] = worker.take_answer()
    return [results[worker] for worker in workers]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, including those that have ended."""
    # The id of the process's CPU clock, as clock_getcpuclockid(3) computes it.
    return time.clock_gettime(~pid << 3 | 2)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return not sock.connect_ex(path)
