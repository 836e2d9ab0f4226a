"""The table of what is measured. stage.py carries out each kind of row."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase


class Kind(Enum):
    """What is done for a row."""

    OUTPUT = "frames from VMs to clients"
    INPUT = "frames from clients to a VM"
    ECHO = "one frame to a VM and back, over and over"
    NEIGHBOUR = "the same while the VM also sends to another client"
    ATTACH = "attach over an attached connection"
    PING = "a command to the agent and its answer"
    CONNECT = "connect, attach, close"
    MEMORY = "clients that are there and do nothing"


@dataclass(frozen=True)
class Figure:
    """A number that a row has in each round. `key` is its key in the result of the measurement."""

    key: str
    name: str
    unit: str
    lower_is_better: bool = False


MB_PER_SECOND = Figure("mb_per_s", "", "MB/s")
CPU = Figure("cpu", "", "ms of CPU per MB", lower_is_better=True)
P50 = Figure("p50", "p50", "µs", lower_is_better=True)
P99 = Figure("p99", "p99", "µs", lower_is_better=True)
P999 = Figure("p999", "p99.9", "µs", lower_is_better=True)
PER_SECOND = Figure("rate", "", "per s")
BYTES = Figure("kb_each", "", "kB each", lower_is_better=True)

RELAY = "the relay"
HOP = "one hop"
QUIET = "a quiet one"
NOTHING = ""


@dataclass(frozen=True)
class Row:
    """One thing that is measured, in several rounds. `against` is what it is compared with."""

    key: str
    group: str
    title: str
    kind: Kind
    figures: tuple[Figure, ...]
    against: str = RELAY
    vms: int = 1
    #: Of all VMs together.
    sessions: int = 1
    payload: int = 64
    #: Whether stdin is paced, as it is by default.
    paced: bool = True
    #: Fewer rounds are enough for what takes long and hardly varies.
    most_rounds: int = 1000


OUTPUT = "Output, VM to clients"
INPUT = "Input, clients to VM"
LATENCY = "Echo of one 64 B frame"
NEIGHBOUR = "The same, beside a neighbour who is sent 10 MB/s and stalls"
COMMANDS = "Commands"
CONNECTIONS = "Connections"
MEMORY = "Memory of the daemon"
BY_SESSIONS = "Output in 1 KiB frames, by number of sessions"
BY_VMS = "Output in 1 KiB frames, by number of VMs with 4 sessions each"

OUTPUT_PAYLOADS = (64, 256, 1024, 4096, 8192)
INPUT_PAYLOADS = (64, 1024, 8192)
SESSION_COUNTS = (1, 4, 16, 64, 256, 1000)
VM_COUNTS = (1, 2, 4, 8, 16)
_MANY = 1000
_SESSIONS_PER_VM = 4


def _size(payload: int) -> str:
    return f"{payload} B" if payload < 1024 else f"{payload // 1024} KiB"


def _output() -> Iterator[Row]:
    for sessions in (1, 16):
        for payload in OUTPUT_PAYLOADS:
            yield Row(
                f"down-{payload}-x{sessions}", OUTPUT, f"{_size(payload)} frames, x{sessions}",
                Kind.OUTPUT, (MB_PER_SECOND,), sessions=sessions, payload=payload,
            )  # fmt: skip
    yield Row(
        "down-1024-x16-4vms", OUTPUT, "1 KiB frames, x16 on 4 VMs",
        Kind.OUTPUT, (MB_PER_SECOND,), vms=4, sessions=16, payload=1024,
    )  # fmt: skip


def _input() -> Iterator[Row]:
    for sessions in (1, 16):
        for payload in INPUT_PAYLOADS:
            yield Row(
                f"up-{payload}-x{sessions}", INPUT, f"{_size(payload)} frames, x{sessions}, not paced",
                Kind.INPUT, (MB_PER_SECOND,), sessions=sessions, payload=payload, paced=False,
            )  # fmt: skip
    yield Row(
        "up-1024-x16-paced", INPUT, "1 KiB frames, x16, paced",
        Kind.INPUT, (MB_PER_SECOND,), NOTHING, sessions=16, payload=1024,
    )  # fmt: skip


def _scale() -> Iterator[Row]:
    for sessions in SESSION_COUNTS:
        yield Row(
            f"sessions-{sessions}", BY_SESSIONS, f"{sessions} session{'s' * (sessions > 1)}",
            Kind.OUTPUT, (MB_PER_SECOND, CPU), sessions=sessions, payload=1024,
        )  # fmt: skip
    for vms in VM_COUNTS:
        yield Row(
            f"vms-{vms}", BY_VMS, f"{vms} VM{'s' * (vms > 1)}",
            Kind.OUTPUT, (MB_PER_SECOND, CPU), vms=vms, sessions=vms * _SESSIONS_PER_VM, payload=1024,
        )  # fmt: skip


def _round_trips() -> Iterator[Row]:
    percentiles = (P50, P99, P999)
    yield Row("echo", LATENCY, "nothing else going on", Kind.ECHO, percentiles)
    yield Row("echo-idle", LATENCY, f"{_MANY} idle sessions", Kind.ECHO, percentiles, sessions=_MANY + 1)
    yield Row("echo-stall", NEIGHBOUR, "on the same VM", Kind.NEIGHBOUR, percentiles, QUIET)
    yield Row("attach", COMMANDS, "attach", Kind.ATTACH, (P50, P99), HOP)
    yield Row("ping", COMMANDS, "hyper ping", Kind.PING, (P50, P99), HOP)
    yield Row("connect", CONNECTIONS, "connect + attach + close", Kind.CONNECT, (PER_SECOND,), HOP)


def _memory() -> Iterator[Row]:
    yield Row(
        "memory-connection", MEMORY, f"{_MANY} idle connections",
        Kind.MEMORY, (BYTES,), NOTHING, sessions=0, most_rounds=3,
    )  # fmt: skip
    yield Row(
        "memory-session", MEMORY, f"{_MANY}, with an I/O session",
        Kind.MEMORY, (BYTES,), NOTHING, sessions=_MANY, most_rounds=3,
    )  # fmt: skip


ROWS: tuple[Row, ...] = (*_output(), *_input(), *_round_trips(), *_memory(), *_scale())


def chosen(patterns: list[str]) -> list[Row]:
    """Return the rows that match any of the shell patterns; all rows if there are no patterns.

    Raises `ValueError` for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.key, pattern) for row in ROWS):
            raise ValueError(f"no row is called {pattern!r}")
    return [row for row in ROWS if not patterns or any(fnmatchcase(row.key, one) for one in patterns)]
