"""A run: a daemon, worlds of VMs and clients, a probe, and a sample of the daemon each second."""

import random
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.measure import Bystanders
from bench.processes import BenchError, Daemon, Worker, gather
from bench.streams import WrongBytesError
from cc_proxy import __version__
from cc_proxy.api import Client, Status
from soak.probe import Probe
from soak.samples import Record, Sample

#: The spool is so small that it is full now and then. `linger` changes with each SIGHUP, and must not matter.
_SETTINGS = """\
session_limit = 1_000_000
[vm]
bye_linger = {linger}
"""
_WORLDS = 2
#: Seconds between two samples, between two turns of the probe, and, on average, between two SIGHUPs.
_LOOK = 1.0
_PROBE = 0.1
_RELOAD = 10.0
#: Seconds that the daemon may take at the end until it is as it was at the beginning.
_SETTLE = 30.0
#: What the daemon must never log. Of what clients and VMs do, it may only warn.
_ERRORS = ('"level": "ERROR"', '"level": "CRITICAL"', "Traceback")

Show = Callable[[float, str], None]


class Stage:
    """Everything that a run needs; `run` may be called once."""

    def __init__(self, seconds: float, vms: int, seed: int, replace: float = 0.0) -> None:
        """`replace` is after how many seconds another process takes over each time; 0 for never."""
        self._seconds = seconds
        self._vms = vms
        self._seed = seed
        self._dice = random.Random(seed)
        self._samples: list[Sample] = []
        self._replace = replace or 2 * seconds
        self._reloads: list[float] = []
        self._replacements: list[float] = []
        self._begun = 0.0
        self._bystanders: Bystanders | None = None

    def run(self, show: Show) -> Record:
        """Carry out the run; `show` is called with its progress. Raises `BenchError` if anything is wrong."""
        with tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as directory:
            with Daemon("daemon", Path(directory), _SETTINGS.format(linger=10)) as daemon:
                try:
                    record = self._soak(daemon, directory, show)
                    _stop(daemon)
                except (WrongBytesError, OSError, BenchError) as error:
                    raise BenchError("\n".join([str(error), *daemon.complaints()])) from error
            return record

    def _soak(self, daemon: Daemon, directory: str, show: Show) -> Record:
        daemon.settle()
        before = self._at_rest(daemon)
        self._begun = time.monotonic()
        with _worlds(directory) as worlds:
            for number, world in enumerate(worlds):
                seed, vms = self._seed * _WORLDS + number, self._vms // _WORLDS
                world.begin("run", proxy=daemon.path, vms=vms, seconds=self._seconds, seed=seed)
            self._bystanders = Bystanders([daemon, *worlds])
            self._watch(daemon, directory, worlds, show)
            self._bystanders = None
            show(self._seconds, "everything that was sent arrives")
            results = gather(*worlds)
        after = self._settled(daemon, before)
        return Record(
            version=__version__, seed=self._seed, seconds=self._seconds, samples=self._samples, before=before,
            after=after, done=_summed(results), course=self._course(results), reloads=self._reloads,
            replacements=self._replacements,
        )  # fmt: skip

    def _watch(self, daemon: Daemon, directory: str, worlds: list[Worker], show: Show) -> None:
        reload_at, replace_at = self._begun + _RELOAD, self._begun + self._replace
        with Probe(daemon.path, directory) as probe, Client(daemon.path, timeout=10) as client:
            while (now := time.monotonic()) < self._begun + self._seconds:
                echoes, pings = self._probe(probe, min(now + _LOOK, self._begun + self._seconds))
                self._samples.append(self._look(daemon, client.status(), echoes, pings))
                show(self._samples[-1].at, _in_words(self._samples[-1]))
                _still_at_work(worlds)
                if now >= reload_at:
                    self._reload(daemon)
                    reload_at = now + self._dice.expovariate(1 / _RELOAD)
                if now >= replace_at:
                    daemon.replace()
                    self._bystanders = Bystanders([daemon, *worlds])
                    self._replacements.append(now - self._begun)
                    replace_at = now + self._replace
            probe.end()

    def _probe(self, probe: Probe, until: float) -> tuple[list[float], list[float]]:
        echoes, pings = [], []
        while (now := time.monotonic()) < until:
            echoes.append(probe.echo())
            pings.append(probe.ping())
            time.sleep(max(0.0, min(now + _PROBE, until) - time.monotonic()))
        return echoes, pings

    def _look(self, daemon: Daemon, status: Status, echoes: list[float], pings: list[float]) -> Sample:
        memory = daemon.memory()
        return Sample(
            at=time.monotonic() - self._begun, rss=memory["Rss"], pss=memory["Pss"],
            fds=daemon.count_fds(), threads=daemon.count_threads(),
            sessions=sum(vm.streams.sessions for vm in status.vms if vm.streams), vms=status.vm_count,
            connections=status.connections, spooled=status.spooled, others=self._others(), echoes=echoes,
            pings=pings,
        )  # fmt: skip

    def _others(self) -> float:
        if self._bystanders is None:
            return 0.0
        cores = self._bystanders.cores()
        self._bystanders.start()
        return cores

    def _reload(self, daemon: Daemon) -> None:
        daemon.configure(_SETTINGS.format(linger=self._dice.randint(5, 15)))
        daemon.process.send_signal(signal.SIGHUP)
        self._reloads.append(time.monotonic() - self._begun)

    def _at_rest(self, daemon: Daemon) -> Sample:
        with Client(daemon.path, timeout=10) as client:
            return self._look(daemon, client.status(), [], [])

    def _settled(self, daemon: Daemon, before: Sample) -> Sample:
        """Wait until the daemon is as it was, for `_SETTLE` seconds at most; returns how it is then."""
        deadline = time.monotonic() + _SETTLE
        while (now := self._at_rest(daemon)).vms or now.fds > before.fds or now.threads > before.threads:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return now

    def _course(self, results: Sequence[dict[str, Any]]) -> list[tuple[float, int, int]]:
        """Return the sum of the worlds' courses, each of which has one entry per second."""
        return [
            (min(at for at, _, _ in moment) - self._begun, sum(size for _, size, _ in moment),
             sum(died for _, _, died in moment))
            for moment in zip(*(result["course"] for result in results), strict=False)
        ]  # fmt: skip


@contextmanager
def _worlds(directory: str) -> Iterator[list[Worker]]:
    worlds: list[Worker] = []
    try:
        for number in range(_WORLDS):
            own = Path(directory, f"world{number}")
            own.mkdir()
            worlds.append(Worker(own.name, "soak.world", str(own), own.name))
        yield worlds
    finally:
        for world in worlds:
            world.stop()


def _still_at_work(worlds: list[Worker]) -> None:
    """Raise `BenchError` if a world has answered before its time: then something is wrong."""
    pipes = {world.process.stdout: world for world in worlds if world.process.stdout}
    for pipe in select.select(list(pipes), [], [], 0)[0]:
        pipes[pipe].take_answer()
        raise BenchError(f"{pipes[pipe].name} has ended before its time")


def _summed(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result["done"])
    return dict(total)


def _in_words(sample: Sample) -> str:
    return (
        f"{sample.vms} VMs, {sample.sessions} sessions, {sample.rss / 1e6:.1f} MB, {sample.threads} threads"
    )


def _stop(daemon: Daemon) -> None:
    daemon.process.terminate()
    if status := daemon.process.wait(_SETTLE):
        raise BenchError(f"the daemon has ended with status {status}")
    wrong = [line for line in daemon.complaints(1_000_000) if any(mark in line for mark in _ERRORS)]
    if wrong:
        raise BenchError("\n".join(["the daemon has logged:", *wrong[:5]]))
