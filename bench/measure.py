"""Rounds of measurements, each of all rows in turn, and how much CPU other processes took meanwhile."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.processes import BenchError, Child, cpu_seconds
from bench.results import Round, RowResult
from bench.rows import Row
from bench.stage import Stage

#: A round counts as quiet if other processes took this many cores at most.
QUIET = 0.2
#: How often a round of a row is repeated at most if it was not quiet.
_REPEATS = 2
#: Repeats in all, as a share of the planned rounds, so that a run on a busy machine comes to an end.
_REPEATED_SHARE = 0.34

_TICKS = os.sysconf("SC_CLK_TCK")


class Bystanders:
    """Measures how many cores other processes have taken since `start`, on average.

    It measures in two ways and takes the larger figure. The CPU clocks of all processes are exact, but miss
    processes that have come and gone, and those in other containers. The kernel's statistics have everything,
    but a clock tick samples them, which sees too little of what runs for microseconds.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self._own = {os.getpid(), *(child.process.pid for child in children)}
        self.start()

    def start(self) -> None:
        self._at = time.monotonic()
        self._clocks = self._read_clocks()
        self._sampled = self._read_statistics()

    def cores(self) -> float:
        clocks = self._read_clocks()
        exact = sum(used - self._clocks.get(pid, 0.0) for pid, used in clocks.items())
        sampled = self._read_statistics() - self._sampled
        return max(0.0, exact, sampled) / (time.monotonic() - self._at)

    def _read_clocks(self) -> dict[int, float]:
        """Return the CPU seconds of each process that is not ours."""
        clocks = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid not in self._own:
                with contextlib.suppress(OSError):
                    clocks[pid] = cpu_seconds(pid)
        return clocks

    def _read_statistics(self) -> float:
        """Return the CPU seconds of all cores, except ours. Only differences mean something."""
        # `steal` is what the hypervisor has given to other machines.
        user, nice, system, _, _, _, _, steal = Path("/proc/stat").read_text().split(None, 9)[1:9]
        busy = sum(map(int, (user, nice, system, steal))) / _TICKS
        times = os.times()
        ended = times.children_user + times.children_system
        return busy - time.process_time() - ended - sum(child.cpu_seconds() for child in self._children)


class Rounds:
    """All rounds of all rows.

    Before each round of a row, `progress` is called with how many are done, and what comes next.
    """

    def __init__(
        self, stage: Stage, rows: Sequence[Row], rounds: int, progress: Callable[[int, str], None]
    ) -> None:
        self._stage = stage
        self._rows = rows
        self._rounds = rounds
        self._progress = progress
        self._bystanders = Bystanders(stage.children)
        self._repeats_left = round(planned(rows, rounds) * _REPEATED_SHARE)
        self.results = [RowResult.of(row) for row in rows]

    def run(self) -> None:
        """Make all rounds. Raises `BenchError` at the first thing that is wrong."""
        done = 0
        for number in range(self._rounds):
            for row, result in zip(self._rows, self.results, strict=True):
                if number < row.most_rounds:
                    self._progress(done, f"round {number + 1} of {self._rounds}: {row.key}")
                    self._count(row, result, number)
                    done += 1

    def _count(self, row: Row, result: RowResult, number: int) -> None:
        """Make a round of a row, repeat it if it was not quiet, and keep the quietest."""
        tries = [self._once(row, number)]
        while min(one.others for one in tries) > QUIET and len(tries) <= _REPEATS and self._repeats_left:
            self._repeats_left -= 1
            tries.append(self._once(row, number))
        best = min(tries, key=lambda one: one.others)
        result.rounds.append(best)
        result.discarded += [one for one in tries if one is not best]

    def _once(self, row: Row, number: int) -> Round:
        """Measure a row and its yardstick. In every other round the yardstick comes first."""
        self._bystanders.start()
        try:
            if number % 2:
                yardstick = self._stage.measure_yardstick(row)
                ours = self._stage.measure(row)
            else:
                ours = self._stage.measure(row)
                yardstick = self._stage.measure_yardstick(row)
        except BenchError as error:
            raise BenchError(f"{row.key} ({row.group}, {row.title}): {error}") from None
        return Round(self._bystanders.cores(), ours, yardstick)


def planned(rows: Sequence[Row], rounds: int) -> int:
    """Return how many rounds of single rows `rounds` rounds of all rows make."""
    return sum(min(rounds, row.most_rounds) for row in rows)
