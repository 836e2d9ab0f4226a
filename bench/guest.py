"""`python -m bench --vm`: what a real VM under QEMU costs, and which part of that is due to the proxy."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.guest_hosts import Direct, Host, Proxied
from bench.picture import BLUE, STYLE
from bench.processes import BenchError, Daemon
from bench.results import Machine
from cc_proxy.ctl.errors import Failure, Interrupted
from cc_proxy.ctl.options import GUEST_VARIABLE, GuestOptions, VmSockets
from cc_proxy.ctl.signals import Signals
from cc_proxy.ctl.vm.lifetime import virtual_machine
from cc_proxy.ctl.vm.settings import choose
from cc_proxy.hyperstart.codes import Code

MB = 1_000_000
_OUTPUT, _INPUT = 20 * MB, 10 * MB
_PINGS, _EXECS = 200, 20
_GUEST = Path(__file__).parent.parent / "build" / "guest" / "guest.toml"


class Quantity(NamedTuple):
    """Something that is measured in the same way with the proxy and without it."""

    title: str
    unit: str
    measure: Callable[[Host], float]


def _ping(host: Host) -> float:
    return 1000 * median(_seconds(lambda: host.command(Code.PING)) for _ in range(_PINGS))


def _exec(host: Host) -> float:
    return 1000 * median(_seconds(lambda: host.run(("true",))) for _ in range(_EXECS))


def _output(host: Host) -> float:
    def run() -> None:
        size = host.run(("head", "-c", str(_OUTPUT), "/dev/zero"))
        if size != _OUTPUT:
            raise BenchError(f"{size} bytes of output in place of {_OUTPUT}")

    return _OUTPUT / MB / _seconds(run)


def _input(host: Host) -> float:
    data = os.urandom(_INPUT)
    return _INPUT / MB / _seconds(lambda: host.run(("sh", "-c", f"[ $(wc -c) = {_INPUT} ]"), data))


QUANTITIES = (
    Quantity("ping", "ms", _ping),
    Quantity("exec to its exit status", "ms", _exec),
    Quantity("output", "MB/s", _output),
    Quantity("stdin", "MB/s", _input),
)
BOOT = "boot to READY"
UNITS = {BOOT: "s"} | {quantity.title: quantity.unit for quantity in QUANTITIES}
MEMORY = ("QEMU", "its owner (keeper)", "cc-proxy")

#: Lists of figures, by what was measured.
Figures = dict[str, list[float]]


def main(rounds: int, picture: Path, console: Console) -> None:
    """Measure, and show the results. Raises `BenchError`."""
    if GUEST_VARIABLE not in os.environ and _GUEST.exists():
        os.environ[GUEST_VARIABLE] = str(_GUEST)
    direct: Figures = {}
    proxied: Figures = {}
    memory: Figures = {}
    with tempfile.TemporaryDirectory(prefix="ccb-") as path, Signals() as signals:
        try:
            for number in range(rounds):
                console.print(f"round {number + 1} of {rounds}", style="dim")
                _measure_direct(signals, direct)
                with Daemon(f"daemon{number}", Path(path)) as daemon:
                    _measure_proxied(signals, daemon, proxied, memory)
        except Interrupted:
            raise KeyboardInterrupt from None
        except (Failure, OSError, StopIteration) as error:
            raise BenchError(str(error) or "the VM has gone") from None
    _show(direct, proxied, memory, console)
    _draw(direct, proxied, memory, picture)
    console.print(f"The picture is {picture}.")


def _measure_direct(signals: Signals, figures: Figures) -> None:
    began = time.monotonic()
    with _vm(signals) as sockets, Direct(sockets) as host:
        _note(figures, BOOT, time.monotonic() - began)
        with signals.may_interrupt():
            _measure(host, figures)


def _measure_proxied(signals: Signals, daemon: Daemon, figures: Figures, memory: Figures) -> None:
    before = daemon.memory()["Pss"]
    began = time.monotonic()
    with _vm(signals) as sockets, Proxied(daemon.path, sockets) as host:
        _note(figures, BOOT, time.monotonic() - began)
        with signals.may_interrupt():
            _measure(host, figures)
        owner = int(Path(sockets.ctl).with_name("owner").read_text())
        for name, size in zip(MEMORY, (_pss(_child_of(owner)), _pss(owner)), strict=False):
            _note(memory, name, size / MB)
        _note(memory, MEMORY[-1], (daemon.memory()["Pss"] - before) / MB)


@contextmanager
def _vm(signals: Signals) -> Iterator[VmSockets]:
    """Yield the sockets of a VM that has booted."""
    settings = choose(GuestOptions(os.environ.get(GUEST_VARIABLE), {}))
    with virtual_machine(signals, settings, "bench") as machine:
        yield machine.sockets


def _measure(host: Host, figures: Figures) -> None:
    host.start_pod()
    for quantity in QUANTITIES:
        quantity.measure(host)  # once to warm up
        _note(figures, quantity.title, quantity.measure(host))


def _note(figures: Figures, name: str, figure: float) -> None:
    figures.setdefault(name, []).append(figure)


def _pss(pid: int) -> int:
    """Return a process's proportional set size in bytes: it has its share of each page that is shared."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1])


def _child_of(pid: int) -> int:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                return int(stat.parent.name)
    raise BenchError("there is no QEMU")


def _seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


# The results ------------------------------------------------------------------------------------------


_EXPLANATION = (
    "Medians of the rounds, each with VMs of its own. Without: the same program talks to the hypervisor's "
    "sockets. cc-proxy's part is of the time that something takes; noise may make it negative."
)


def _show(direct: Figures, proxied: Figures, memory: Figures, console: Console) -> None:
    table = Table("", "", "with cc-proxy", "without", "cc-proxy's part", box=SIMPLE_HEAD)
    for title, unit in UNITS.items():
        ours, others = median(proxied[title]), median(direct[title])
        table.add_row(title, unit, f"{ours:.3g}", f"{others:.3g}", f"{_part(unit, ours, others):.0%}")
    total = sum(map(median, memory.values()))
    for name in MEMORY:
        size = median(memory[name])
        table.add_row(f"memory: {name}", "MB", f"{size:.3g}", "", f"{size / total:.1%} of all")
    console.print(table)
    console.print(f"{_EXPLANATION} {_caption()}.", style="dim", highlight=False)


def _part(unit: str, ours: float, others: float) -> float:
    """Return the part of the time that the proxy takes."""
    return 1 - (ours / others if unit == "MB/s" else others / ours)


def _caption() -> str:
    this = Machine.this()
    return f"{this.cores} cores of {this.processor}, Linux {this.kernel}, cc-proxy {this.cc_proxy}"


def _draw(direct: Figures, proxied: Figures, memory: Figures, path: Path) -> None:
    """Draw a bar for each quantity, divided into the proxy's part and the VM's."""
    parts = {}
    for title, unit in UNITS.items():
        ours, others = median(proxied[title]), median(direct[title])
        parts[f"{title}\n{ours:.3g} {unit}"] = 100 * max(0.0, _part(unit, ours, others))
    total = sum(map(median, memory.values()))
    parts[f"memory\n{total:.3g} MB"] = 100 * (1 - median(memory[MEMORY[0]]) / total)
    names, ours_of_all = list(reversed(parts)), list(reversed(parts.values()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.barh(names, [100] * len(names), color="#dddddd", label="the VM's")
        axes.barh(names, ours_of_all, color=BLUE, label="cc-proxy's")
        for name, part in zip(names, ours_of_all, strict=True):
            axes.annotate(f" {part:.0f} %", (part, name), va="center")
        axes.set(xlim=(0, 100), xlabel="% of the time, or of the memory", title="A VM under QEMU")
        figure.legend(loc="outside upper right", ncols=2)
        figure.supxlabel(_caption(), fontsize=8, color="#444444")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {})
