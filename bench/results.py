"""The results: for people to compare, and as JSON for programs. Pure, except for the look at this machine."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import msgspec

from bench.figures import Spread, spread
from bench.rows import Row
from cc_proxy import __version__


class ResultsError(Exception):
    """A file does not contain results; the text says why."""


class Round(msgspec.Struct):
    """One round of one row: figures by their keys. `others` is how many cores other processes took."""

    others: float
    ours: dict[str, float]
    #: Empty if there is none.
    yardstick: dict[str, float]


class RowResult(msgspec.Struct):
    """All rounds of a row. Those in `discarded` do not count."""

    key: str
    group: str
    title: str
    against: str
    rounds: list[Round] = []
    discarded: list[Round] = []

    @classmethod
    def of(cls, row: Row) -> Self:
        return cls(row.key, row.group, row.title, row.against)

    def ours(self, figure: str) -> Spread:
        return spread([one.ours[figure] for one in self.rounds])

    def yardstick(self, figure: str) -> Spread:
        return spread([one.yardstick[figure] for one in self.rounds])

    def ratio(self, figure: str) -> Spread:
        """Return our figure divided by the yardstick's of the same round."""
        return spread([one.ours[figure] / one.yardstick[figure] for one in self.rounds])


class Machine(msgspec.Struct):
    """The machine, and the versions of the software, that the results are from."""

    processor: str
    cores: int
    memory_gb: float
    kernel: str
    python: str
    cc_proxy: str

    @classmethod
    def this(cls) -> Self:
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)),
            memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            kernel=platform.release(),
            python=f"{platform.python_implementation()} {platform.python_version()}",
            cc_proxy=__version__,
        )


class Results(msgspec.Struct):
    """A whole run."""

    date: str
    machine: Machine
    rounds: int
    #: How long a measurement was meant to take.
    seconds: float
    rows: list[RowResult]
    format: int = 1

    @classmethod
    def begin(cls, rounds: int, seconds: float, rows: list[RowResult]) -> Self:
        now = datetime.now(UTC).isoformat(timespec="minutes")
        return cls(now, Machine.this(), rounds, seconds, rows)

    def row(self, key: str) -> RowResult | None:
        return next((row for row in self.rows if row.key == key), None)

    def caption(self) -> str:
        """Return a line that says what the results are from."""
        machine = self.machine
        return (
            f"{machine.cores} cores of {machine.processor}, Linux {machine.kernel}, {machine.python}, "
            f"cc-proxy {machine.cc_proxy}, {self.date[:10]}, {self.rounds} rounds"
        )

    def save(self, path: Path) -> None:
        """Write JSON: every round of every row, and a summary of each row."""
        tree = msgspec.to_builtins(self)
        for row, into in zip(self.rows, tree["rows"], strict=True):
            into["summary"] = _summary(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(tree)) + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` wrote. Raises `ResultsError`."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise ResultsError(f"{path}: not results of this benchmark: {error}") from None


def _summary(row: RowResult) -> dict[str, dict[str, Spread]]:
    if not row.rounds:
        return {}
    first = row.rounds[0]
    return {
        figure: {"ours": row.ours(figure)}
        | (
            {"yardstick": row.yardstick(figure), "ratio": row.ratio(figure)}
            if figure in first.yardstick
            else {}
        )
        for figure in first.ours
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.machine()
