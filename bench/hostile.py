"""`python -m bench.hostile`, as root: how long a user's echoes and requests take while another attacks."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from bench import attack, hostile_vms, starving
from bench.processes import BenchError, Child, Daemon, Worker, gather
from bench.stage import start_sessions

#: The attacker: a uid that no user of this machine has.
_UID = 54_323
#: Seconds that an attack may take to get all its connections.
_WARM_UP = 60.0
#: Seconds in which an attack uses up what a user may take at once.
_USED_UP = 2.0
#: Seconds that the daemon may take to notice that all of them are gone: it reads on at the user's rate.
_GOODBYE = 300.0
#: The victim's VM, and the connection that said hello for it.
_STAYING = 2
#: Connections of an attack that sends messages of a megabyte.
_FEW = 8
_COMING_AND_GOING = frozenset({"churn", "nonsense", "vms", starving.HABIT})
#: A VM, and its client's connection.
_A_VM = 2
_CONTAINER = "victim"
_HEADING = f"{'attack':10} {'at once':>11}  {'echo p50, p99':>19}  ratio  {'attach p50, p99':>19}  ratio"

_HABITS = [*attack.HABITS, "all", starving.HABIT, *hostile_vms.HABITS]

Figures = dict[str, dict[str, float]]


class Scene:
    """A daemon, a user whose requests are timed, and sometimes another user, who attacks."""

    def __init__(self, directory: Path, stack: ExitStack, seconds: float) -> None:
        self._seconds = seconds
        self._theirs = directory / "theirs"
        self._theirs.mkdir()
        os.chown(self._theirs, _UID, -1)
        self._daemon = stack.enter_context(Daemon("daemon", directory, f"[access]\nusers = [{_UID}]\n"))
        self._vms = stack.enter_context(Worker("VMs", "bench.vms", str(directory)))
        self._clients = stack.enter_context(Worker("clients", "bench.clients"))
        runtime = stack.enter_context(Worker("runtime", "bench.clients"))
        [paths] = self._vms.call("open", count=1)
        self._vms.begin("boot")
        runtime.begin("hello", proxy=self._daemon.path, vms={_CONTAINER: paths})
        gather(self._vms, runtime)

    def measure(self) -> Figures:
        """Time echoes over a new session, and then attaches."""
        self._clients.call("attach", proxy=self._daemon.path, containers=[_CONTAINER], connections=1)
        self._vms.call("assign", streams=start_sessions(self._clients, self._vms, 1))
        self._vms.begin("echo")
        self._clients.begin("echo", seconds=self._seconds)
        echo, _ = gather(self._clients, self._vms)
        attach = self._clients.call("time_attach", container=_CONTAINER, seconds=self._seconds)
        self._clients.call("close")
        return {"echo": echo, "attach": attach}

    @contextmanager
    def attacked(self, habit: str, count: int) -> Iterator[None]:
        """Have another user attack as long as the context lasts, with `count` connections or VMs."""
        arguments = (self._daemon.path, str(_UID), habit, str(count), str(self._theirs))
        with Child("attacker", "bench.attack", *arguments):
            if habit not in _COMING_AND_GOING:
                self._wait_for(count * (_A_VM if habit in hostile_vms.HABITS else 1))
            time.sleep(_USED_UP)
            self.measure()  # the first requests under attack do not count
            yield
        self._daemon.settle(_GOODBYE, _STAYING)

    def _wait_for(self, number: int) -> None:
        deadline = time.monotonic() + _WARM_UP
        while self._daemon.connections() < _STAYING + number and time.monotonic() < deadline:
            time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    parser.add_argument("--connections", type=int, default=1_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("habits", nargs="*", metavar="HABIT", help=f"of: {', '.join(_HABITS)}")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it takes root to be two users")
    try:
        _run(options.habits or _HABITS, options)
    except BenchError as error:
        print(f"bench: FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def _run(habits: list[str], options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cc-proxy-", dir="/tmp")))
        directory.chmod(0o755)
        scene = Scene(directory, stack, options.seconds)
        print(_HEADING)
        for habit in habits:
            count = _count(habit, options.connections)
            quiet, attacked = [], []
            for _ in range(options.rounds):
                quiet.append(scene.measure())
                with scene.attacked(habit, count):
                    attacked.append(scene.measure())
            print(f"{'(quiet)':10} {'':11}  {_line(quiet, quiet)}")
            print(f"{habit:10} {count:11}  {_line(attacked, quiet)}", flush=True)


def _count(habit: str, connections: int) -> int:
    if habit in hostile_vms.HABITS:
        return hostile_vms.HABITS[habit]
    if habit == starving.HABIT:
        return starving.HELLOS
    return _FEW if habit in {"long", "deep"} else connections


def _line(rounds: list[Figures], against: list[Figures]) -> str:
    cells = []
    for what in ("echo", "attach"):
        p50, p99 = (median(figures[what][name] for figures in rounds) for name in ("p50", "p99"))
        ratio = median(
            mine[what]["p99"] / theirs[what]["p99"] for mine, theirs in zip(rounds, against, strict=True)
        )
        cells.append(f"{p50:7.0f} {p99:8.0f} µs  {ratio:5.2f}")
    return "  ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
