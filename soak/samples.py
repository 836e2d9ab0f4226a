"""What was measured of the daemon over time, and whether it stayed flat. Pure, except for files."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec

from bench.figures import percentile
from bench.measure import QUIET

#: The share of the run in which caches fill, and the number of clients reaches its level.
WARM_UP = 0.2
_BINS = 30
#: In a run of fewer seconds, a slope means nothing.
_SHORTEST = 240.0


class Sample(msgspec.Struct, frozen=True):
    """The daemon at one moment. Sizes are in bytes, times in seconds since the run began."""

    at: float
    rss: int
    pss: int
    fds: int
    threads: int
    sessions: int
    vms: int
    connections: int
    spooled: int
    #: Cores that other processes of the machine have taken since the previous sample.
    others: float
    #: Seconds that each round trip has taken since the previous sample.
    echoes: list[float]
    pings: list[float]


class Record(msgspec.Struct, frozen=True):
    """A whole run."""

    version: str
    seed: int
    seconds: float
    samples: list[Sample]
    #: Before anything began, and after everything had ended.
    before: Sample
    after: Sample
    #: How often each thing was done.
    done: dict[str, int]
    #: Once per second: the time since the run began, bytes that had arrived, VMs that had died.
    course: list[tuple[float, int, int]]
    #: When the settings were read again, and when another process took over.
    reloads: list[float]
    replacements: list[float] = []

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(self))

    @classmethod
    def load(cls, path: Path) -> "Record":
        return msgspec.json.decode(path.read_bytes(), type=cls)


class Line(NamedTuple):
    """A quantity over time, and how far it may rise from the warm-up to the end.

    Proportional memory is not judged: it rises when another process ends that shared the same libraries.
    Of round trips only the fastest tenth is judged, and only on a quiet machine, because how long they take
    depends on what else the machine does.
    """

    key: str
    title: str
    unit: str
    scale: float
    #: As a share of the median; None if the line is shown, but not judged.
    allowed: float | None


LINES = (
    Line("rss", "resident memory", "MB", 1e-6, 0.05),
    Line("pss", "proportional memory", "MB", 1e-6, None),
    Line("fds", "open fds", "", 1, 0.15),
    Line("threads", "threads", "", 1, 0.15),
    Line("spooled", "bytes in the spool", "MB", 1e-6, 0.5),
    Line("echo p10", "echo, fastest tenth", "ms", 1e3, 0.25),
    Line("echo p50", "echo, median", "ms", 1e3, None),
    Line("echo p99", "echo, p99", "ms", 1e3, None),
    Line("ping p10", "ping, fastest tenth", "ms", 1e3, 0.25),
    Line("ping p50", "ping, median", "ms", 1e3, None),
    Line("ping p99", "ping, p99", "ms", 1e3, None),
)


class Verdict(NamedTuple):
    """How a line was judged."""

    line: Line
    median: float
    most: float
    #: How far it has risen from the warm-up to the end, by its slope, as a share of the median.
    rise: float
    #: `flat` or `rises`; `too short` or `busy` if the run or the machine was; empty if it is not judged.
    said: str


def series(record: Record, line: Line, bins: int = _BINS) -> tuple[list[float], list[float]]:
    """Return times and values, one for each bin: the bin's median, or the percentile that the line names."""
    name, _, share = line.key.partition(" p")
    times, values = [], []
    for group in _groups(record.samples, bins):
        found = _values(group, {"echo": "echoes", "ping": "pings"}.get(name, name))
        if found:
            times.append(median(sample.at for sample in group))
            values.append(
                line.scale * (percentile(sorted(found), int(share) / 100) if share else median(found))
            )
    return times, values


def judge(record: Record, line: Line) -> Verdict:
    """Judge whether a line is flat."""
    times, values = series(record, line)
    warm = [(at, value) for at, value in zip(times, values, strict=True) if at >= WARM_UP * record.seconds]
    middle = median(value for _, value in warm)
    rise = slope(warm) * (1 - WARM_UP) * record.seconds
    rise = rise / middle if middle else rise
    return Verdict(line, middle, max(value for _, value in warm), rise, _say(record, line, rise))


def _say(record: Record, line: Line, rise: float) -> str:
    if line.allowed is None:
        return ""
    if record.seconds < _SHORTEST:
        return "too short"
    if line.unit == "ms" and median(sample.others for sample in record.samples) > QUIET:
        return "busy"
    return "flat" if rise <= line.allowed else "rises"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the median of the slopes between any two points, so that a few outliers change nothing."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 > x1]
    return median(slopes) if slopes else 0.0


def complaints(record: Record) -> list[str]:
    """Return what is wrong: lines that rise, and what the daemon has not given back."""
    found = [
        f"{verdict.line.title} has risen by {verdict.rise:.0%}, {verdict.line.allowed:.0%} is allowed"
        for verdict in (judge(record, line) for line in LINES)
        if verdict.said == "rises"
    ]
    for name in ("fds", "threads", "vms", "sessions", "spooled"):
        before, after = getattr(record.before, name), getattr(record.after, name)
        if after > before:
            found.append(f"{name}: {after} are left, {before} there were")
    return found


def _groups(samples: Sequence[Sample], bins: int) -> list[Sequence[Sample]]:
    size = max(1, len(samples) // bins)
    return [samples[at : at + size] for at in range(0, len(samples), size)]


def _values(samples: Sequence[Sample], name: str) -> list[Any]:
    if name in ("echoes", "pings"):
        return [took for sample in samples for took in getattr(sample, name)]
    return [getattr(sample, name) for sample in samples]
