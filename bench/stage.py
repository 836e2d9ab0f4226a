"""Carries out one round of a row: with the daemon, and with the row's yardstick."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType

from bench.processes import Child, Daemon, Relay, Service, Worker, gather
from bench.rows import Kind, Row
from bench.streams import NEIGHBOUR_FRAMES, NEIGHBOUR_RATE, frames_in_cycle

#: The result of one measurement: figures by their keys.
Figures = dict[str, float]
Way = Callable[[Row], Figures]
Streams = list[list[int]]

#: Bytes of a row's first transfer, which only serves to choose the size of those that count.
_FIRST_TRANSFER = 8_000_000
_IDLE_CONNECTIONS = 1000
#: Seconds of round trips that are enough for a p99.9.
_LEAST_ROUND_TRIPS = 0.15
#: A socket's path has 107 bytes at most, and the sockets' names are added to this.
_LONGEST_DIRECTORY = 60


def start_sessions(clients: Worker, vms: Worker, sessions: int, vm_count: int = 1) -> Streams:
    """Allocate a session for each attached connection, and start a process on it.

    Returns the streams of each VM.
    """
    vms.begin("start", processes=sessions)
    clients.begin("allocate", vms=vm_count)
    streams: Streams
    streams, _ = gather(clients, vms)
    return streams


class Stage(AbstractContextManager["Stage"]):
    """All the processes that are needed. `seconds` is how long a measurement takes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._round_trip_seconds = max(seconds, _LEAST_ROUND_TRIPS)
        self._numbers = count(1)
        #: The rate of each row's last transfer, in bytes per second, and of its yardstick's (True).
        self._rates: dict[tuple[str, bool], float] = {}
        with ExitStack() as stack:
            start = stack.enter_context
            self._directory = Path(start(_directory()))
            self._daemon = start(Daemon("daemon", self._directory))
            self._unpaced = start(Daemon("unpaced", self._directory, "[stdin]\nwindow = 0\n"))
            self._relay = start(Relay(self._directory))
            self._vms = start(Worker("VMs", "bench.vms", str(self._directory)))
            self._clients = start(Worker("clients", "bench.clients"))
            self._neighbour = start(Worker("neighbour", "bench.clients"))
            self._stack = stack.pop_all()
        self._ways: dict[Kind, tuple[Way, Way]] = {
            Kind.OUTPUT: (self._transfer, self._relay_transfer),
            Kind.INPUT: (self._transfer, self._relay_transfer),
            Kind.ECHO: (self._echo, self._relay_echo),
            Kind.NEIGHBOUR: (self._beside_stalled, self._beside_quiet),
            Kind.ATTACH: (self._attach, self._hop),
            Kind.PING: (self._ping, self._hop),
            Kind.CONNECT: (self._connect, self._hop_connect),
            Kind.MEMORY: (self._memory, _nothing),
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def children(self) -> list[Child]:
        """The processes that run all the time."""
        return [self._daemon, self._unpaced, self._relay, self._vms, self._clients, self._neighbour]

    def complaints(self) -> list[str]:
        """End the measured processes; returns the complaints that they logged, to explain a failure."""
        services: list[Service] = [self._daemon, self._unpaced, self._relay]
        return [f"{service.name}: {line}" for service in services for line in service.complaints()]

    def measure(self, row: Row) -> Figures:
        """Measure a row. Raises `BenchError`, even if just one byte was wrong."""
        return self._ways[row.kind][0](row)

    def measure_yardstick(self, row: Row) -> Figures:
        """Measure the row's yardstick; returns no figures if it has none. Raises `BenchError`."""
        return self._ways[row.kind][1](row) if row.against else {}

    # Throughput -------------------------------------------------------------------------------------------

    def _transfer(self, row: Row) -> Figures:
        daemon = self._daemon if row.paced else self._unpaced
        with self._sessions(daemon, row.vms, row.sessions):
            return self._timed_transfer(row, daemon)

    def _relay_transfer(self, row: Row) -> Figures:
        per_vm = row.sessions // row.vms
        with self._relayed([list(range(1, per_vm + 1)) for _ in range(row.vms)]):
            return self._timed_transfer(row, self._relay)

    def _timed_transfer(self, row: Row, through: Child) -> Figures:
        frames = frames_in_cycle(row.sessions, row.payload)
        for worker in (self._vms, self._clients):
            worker.call("prepare", payload=row.payload, frames=frames)
        size = row.sessions * row.payload * frames
        rate = self._rates.get((row.key, through is self._relay))
        if rate is None:
            cycles = max(1, _FIRST_TRANSFER // size)
            rate = size * cycles / self._move(row, through, frames, cycles)[0]
        cycles = max(1, round(rate * self._seconds / size))
        seconds, cpu = self._move(row, through, frames, cycles)
        self._rates[row.key, through is self._relay] = size * cycles / seconds
        megabytes = size * cycles / 1e6
        return {"mb_per_s": megabytes / seconds, "cpu": cpu * 1000 / megabytes, "mb": megabytes}

    def _move(self, row: Row, through: Child, frames: int, cycles: int) -> tuple[float, float]:
        """Move this many cycles; returns the seconds and the CPU seconds that this took."""
        before = through.cpu_seconds()
        if row.kind is Kind.OUTPUT:
            sender, receiver = self._vms, self._clients
        else:
            sender, receiver = self._clients, self._vms
        if receiver is self._vms and through is not self._relay:
            receiver.begin("receive_stdin", payload=row.payload, frames=frames, cycles=cycles)
        else:
            receiver.begin("receive", cycles=cycles)
        sender.begin("send", cycles=cycles)
        begun, ended = gather(sender, receiver)
        return ended - begun, through.cpu_seconds() - before

    # Round trips ------------------------------------------------------------------------------------------

    def _echo(self, row: Row) -> Figures:
        with self._sessions(self._daemon, 1, row.sessions):
            return self._timed_echo()

    def _relay_echo(self, _row: Row) -> Figures:
        with self._relayed([[1]]):
            return self._timed_echo()

    def _timed_echo(self) -> Figures:
        self._vms.begin("echo")
        self._clients.begin("echo", seconds=self._round_trip_seconds)
        return _first_of(self._clients, self._vms)

    def _beside_stalled(self, _row: Row) -> Figures:
        cycles = max(1, round(self._round_trip_seconds * NEIGHBOUR_RATE / NEIGHBOUR_FRAMES))
        return self._beside_neighbour(cycles)

    def _beside_quiet(self, _row: Row) -> Figures:
        return self._beside_neighbour(0)

    def _beside_neighbour(self, cycles: int) -> Figures:
        """Time echoes while another client on the same VM is sent this many cycles and does not read them."""
        with self._sessions(self._daemon, 1, 1) as containers:
            self._neighbour.call("attach", proxy=self._daemon.path, containers=containers, connections=1)
            [[seq]] = start_sessions(self._neighbour, self._vms, 1)
            self._vms.begin("echo_beside", seq=seq, cycles=cycles)
            found: Figures = self._clients.call("echo", seconds=self._round_trip_seconds)
            # Now the neighbour reads, and everything must be there.
            self._neighbour.begin("receive_neighbour", cycles=cycles)
            gather(self._vms, self._neighbour)
            self._neighbour.call("close")
        return found

    def _attach(self, _row: Row) -> Figures:
        return self._timed_commands("time_attach")

    def _connect(self, _row: Row) -> Figures:
        return self._timed_commands("time_connections")

    def _timed_commands(self, order: str) -> Figures:
        with self._attached(self._daemon, 1, 1) as [container]:
            self._clients.begin(order, container=container, seconds=self._round_trip_seconds)
            return _first_of(self._clients)

    def _ping(self, _row: Row) -> Figures:
        with self._attached(self._daemon, 1, 1):
            self._vms.begin("answer_pings")
            self._clients.begin("time_ping", seconds=self._round_trip_seconds)
            return _first_of(self._clients, self._vms)

    def _hop(self, _row: Row) -> Figures:
        return self._timed_hop("time_hop")

    def _hop_connect(self, _row: Row) -> Figures:
        return self._timed_hop("time_hop_connections")

    def _timed_hop(self, order: str) -> Figures:
        path = self._vms.call("open_hop")
        self._vms.begin("hop")
        self._clients.begin(order, path=path, container="bench", seconds=self._round_trip_seconds)
        found = _first_of(self._clients, self._vms)
        self._vms.call("close")
        return found

    # Memory -----------------------------------------------------------------------------------------------

    def _memory(self, row: Row) -> Figures:
        """Measure a fresh daemon: an older one would reuse memory that it already has."""
        with Daemon("fresh", self._directory) as daemon, self._attached(daemon, 1, 0) as containers:
            before = daemon.resident_bytes()
            many = {"containers": containers, "connections": _IDLE_CONNECTIONS}
            self._clients.call("attach", proxy=daemon.path, **many)
            if row.sessions:
                start_sessions(self._clients, self._vms, _IDLE_CONNECTIONS)
            return {"kb_each": (daemon.resident_bytes() - before) / _IDLE_CONNECTIONS / 1000}

    # VMs and clients --------------------------------------------------------------------------------------
    # None of these cleans up after an error: an error ends the run, and with it all processes.

    @contextmanager
    def _sessions(self, daemon: Daemon, vms: int, sessions: int) -> Iterator[list[str]]:
        """Have sessions, each over its own connection, on each VM in turn; yields the VMs' container ids."""
        with self._attached(daemon, vms, sessions) as containers:
            streams = start_sessions(self._clients, self._vms, sessions, vms)
            self._vms.call("assign", streams=streams)
            yield containers

    @contextmanager
    def _attached(self, daemon: Daemon, vms: int, connections: int) -> Iterator[list[str]]:
        """Register VMs, and attach connections to each of them in turn; yields the VMs' container ids."""
        vm_paths: list[list[str]] = self._vms.call("open", count=vms)
        containers = [f"bench-{next(self._numbers)}" for _ in vm_paths]
        self._vms.begin("boot")
        self._clients.begin("hello", proxy=daemon.path, vms=dict(zip(containers, vm_paths, strict=True)))
        gather(self._vms, self._clients)
        self._clients.call("attach", proxy=daemon.path, containers=containers, connections=connections)
        yield containers
        self._clients.call("close")
        self._vms.call("close")
        daemon.settle()

    @contextmanager
    def _relayed(self, streams: Streams) -> Iterator[None]:
        """Connect to each VM through the relay, over one connection for all of the VM's streams."""
        paths = [io for _, io in self._vms.call("open", count=len(streams))]
        self._vms.begin("accept")
        self._clients.begin("connect_relay", relay=self._relay.path, streams=streams, destinations=paths)
        gather(self._vms, self._clients)
        self._vms.call("assign", streams=streams)
        yield
        self._clients.call("close")
        self._vms.call("close")


def _directory() -> tempfile.TemporaryDirectory[str]:
    """Make a directory for sockets and the spool, with a path that is short enough for sockets."""
    base = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(
        prefix="cc-proxy-bench-", dir=base if len(base) <= _LONGEST_DIRECTORY else "/tmp"
    )


def _first_of(*workers: Worker) -> Figures:
    found: Figures = gather(*workers)[0]
    return found


def _nothing(_row: Row) -> Figures:
    return {}
