"""Summaries of many figures. Pure."""

from collections.abc import Sequence
from statistics import median

import msgspec

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


class Spread(msgspec.Struct, frozen=True):
    """The median and the range of several figures of the same thing."""

    median: float
    least: float
    most: float


def spread(figures: Sequence[float]) -> Spread:
    return Spread(median(figures), min(figures), max(figures))


def percentile(ordered: Sequence[int], share: float) -> int:
    """Return the least of the ordered samples that at least this share of them does not exceed."""
    rank = -(-len(ordered) * round(share * 1000) // 1000)
    return ordered[max(0, rank - 1)]


def latencies(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Return the percentiles of round trips in microseconds, their count, and their rate per second."""
    ordered = sorted(nanoseconds)
    found: dict[str, float] = {
        name: percentile(ordered, share) / 1000 for name, share in _PERCENTILES.items()
    }
    return found | {"count": len(ordered), "rate": len(ordered) / sum(ordered) * 1e9}
