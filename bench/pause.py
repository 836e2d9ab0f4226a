"""`python -m bench --restart`: what clients notice when the daemon is replaced while their streams go on."""

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.figures import percentile
from bench.picture import BLUE, GREEN, STYLE
from bench.processes import BenchError, Daemon, Worker, gather
from bench.results import Machine
from bench.stage import start_sessions
from cc_proxy.api import DEFAULT_SOCKET

VMS, SESSIONS, CONNECTIONS = 64, 1_000, 2_000
#: Streams over which echoes go, each of another VM.
_ECHOES = 8
#: Seconds between the end of a restart and the next.
_INTERVAL = 0.7
#: By default a user other than root may not have this many.
_LIMITS = "[limits.user]\nconnections = 4096\n"


class Restarted(Protocol):
    """A daemon that can be replaced."""

    path: str
    #: How it is replaced, in words.
    how: str

    def replace(self) -> None:
        """Have another process take over; returns once it has."""

    def log(self) -> Sequence[dict[str, object]]:
        """Return what it has logged."""


class Own(Daemon):
    """A daemon that is started here, and starts its successor itself."""

    how = "SIGUSR2"


class Installed:
    """The service of this machine, under its service manager."""

    how = "systemctl restart cc-proxy"
    path = DEFAULT_SOCKET

    def replace(self) -> None:
        """Have systemd restart it."""
        done = subprocess.run(self.how.split(), check=False, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"{self.how}: {done.stderr.strip()}")

    def log(self) -> list[dict[str, object]]:
        """Return what it has logged to the journal."""
        command = "journalctl --sync && journalctl --quiet --boot --output=cat -t cc-proxy"
        lines = subprocess.check_output(["sh", "-c", command], text=True).splitlines()  # noqa: S607
        return [json.loads(line) for line in lines]


class Pauses(NamedTuple):
    """What was seen, in seconds."""

    how: str
    #: When each round of echoes began, and how long each of its echoes took.
    echoes: list[tuple[float, list[float]]]
    #: When each restart began.
    restarts: list[float]
    #: What the daemon logs of each: the time from coming to rest until going on, and that to read the state.
    handing_over: list[float]
    reading: list[float]

    def pauses(self) -> list[float]:
        """Return for each restart and each stream the longest time that an echo took after it had begun."""
        found = []
        for begun, end in zip(self.restarts, [*self.restarts[1:], self.echoes[-1][0] + 1], strict=True):
            # The echo that was on its way when the restart began belongs to it.
            rounds = [took for at, took in self.echoes if at + max(took) >= begun and at < end]
            found += [max(each) for each in zip(*rounds, strict=True)]
        return found


def main(restarts: int, service: bool, picture: Path, console: Console) -> None:
    """Measure, and show the results. Raises `BenchError`."""
    found = _measure(restarts, service, console)
    _show(found, console)
    _draw(found, picture)
    console.print(f"The picture is {picture}.")


def _measure(restarts: int, service: bool, console: Console) -> Pauses:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ccb-", dir="/var/tmp")))
        directory.chmod(0o755)
        daemon: Restarted
        daemon = Installed() if service else stack.enter_context(Own("daemon", directory, _LIMITS))
        vms = stack.enter_context(Worker("VMs", "bench.vms", str(directory)))
        clients = stack.enter_context(Worker("clients", "bench.clients"))
        _set_up(daemon, vms, clients)
        over = directory / "over"
        vms.begin("echo_on", clients=_ECHOES)
        clients.begin("echo_on", echoes=_ECHOES, until=str(over))
        times = []
        for number in range(restarts):
            time.sleep(_INTERVAL)
            console.print(f"restart {number + 1} of {restarts}", style="dim")
            times.append(time.monotonic())
            daemon.replace()
        time.sleep(_INTERVAL)
        over.touch()
        echoes, _ = gather(clients, vms)
        taken = [line for line in daemon.log() if str(line["message"]).startswith("taken over")][-restarts:]
        clients.call("close")
    if len(taken) < restarts:
        raise BenchError(f"of {restarts} restarts the log has {len(taken)}")
    figures = [[float(str(line[name])) for line in taken] for name in ("seconds", "reading")]
    return Pauses(daemon.how, echoes, times, *figures)


def _set_up(daemon: Restarted, vms: Worker, clients: Worker) -> None:
    paths: list[list[str]] = vms.call("open", count=VMS)
    containers = [f"bench-{number}" for number in range(VMS)]
    vms.begin("boot")
    clients.begin("hello", proxy=daemon.path, vms=dict(zip(containers, paths, strict=True)))
    gather(vms, clients)
    clients.call("attach", proxy=daemon.path, containers=containers, connections=SESSIONS)
    start_sessions(clients, vms, SESSIONS, VMS)
    idle = CONNECTIONS - SESSIONS - VMS
    clients.call("attach", proxy=daemon.path, containers=containers, connections=idle)


# The results ---------------------------------------------------------------------------------------------


def _show(found: Pauses, console: Console) -> None:
    quiet = [took for at, each in found.echoes if at < found.restarts[0] - 0.1 for took in each]
    table = Table("", "p50", "p99", "most", box=SIMPLE_HEAD, title="ms")
    for title, seconds in (
        ("an echo before the first restart", quiet),
        ("an echo's pause at a restart", found.pauses()),
        ("from the old process at rest to the new one at work", found.handing_over),
        ("the new process reads the state", found.reading),
    ):
        ordered = sorted(round(1e6 * one) for one in seconds)
        figures = [percentile(ordered, 0.5), percentile(ordered, 0.99), ordered[-1]]
        table.add_row(title, *(f"{figure / 1000:.3g}" for figure in figures))
    console.print(table)
    console.print(f"{_caption(found)}.", style="dim", highlight=False)


def _caption(found: Pauses) -> str:
    this = Machine.this()
    return (
        f"{found.how}, {len(found.restarts)} times, with {VMS} VMs, {SESSIONS:,} sessions, {CONNECTIONS:,} "
        f"connections, {_ECHOES} of them at work; {this.cores} cores of {this.processor}, "
        f"Linux {this.kernel}, Python {this.python.split()[-1]}, cc-proxy {this.cc_proxy}"
    )


def _draw(found: Pauses, path: Path) -> None:
    """Draw the echoes around the restart with the median pause."""
    pauses = found.pauses()
    each = [max(pauses[at : at + _ECHOES]) for at in range(0, len(pauses), _ECHOES)]
    restart = found.restarts[each.index(sorted(each)[len(each) // 2])]
    shown = [(at - restart, took) for at, took in found.echoes if -0.4 < at - restart < 0.9]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREEN, lw=1, label=found.how)
        axes.plot(
            [at + max(took) for at, took in shown],
            [1000 * max(took) for _, took in shown],
            color=BLUE, marker=".", markersize=3, lw=0.8, drawstyle="steps-pre",
            label="an echo, until it came back",
        )  # fmt: skip
        axes.set(
            title=f"Echoes through a restart (the median of {len(each)})",
            xlabel="seconds", ylabel="round trip, ms", yscale="log", xlim=(-0.4, 0.9),
        )  # fmt: skip
        axes.legend(loc="upper left")
        figure.supxlabel(_caption(found), fontsize=6.5, color="#444444")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {})
