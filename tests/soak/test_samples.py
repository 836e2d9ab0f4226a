"""What is flat, and what is not."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from soak.samples import LINES, Record, Sample, complaints, judge, series, slope

AT_REST = Sample(
    at=0.0, rss=20_000_000, pss=15_000_000, fds=5, threads=4, sessions=0, vms=0, connections=1, spooled=0,
    others=0.0, echoes=[], pings=[],
)  # fmt: skip
RSS = LINES[0]
ECHO = next(line for line in LINES if line.key == "echo p10")


def sample(at: float, **changed: object) -> Sample:
    busy = msgspec.structs.replace(
        AT_REST, at=at, fds=100, threads=40, spooled=1_000, echoes=[0.001], pings=[0.002]
    )
    return msgspec.structs.replace(busy, **changed)


def record(samples: list[Sample], after: Sample = AT_REST) -> Record:
    return Record(
        version="1", seed=1, seconds=600.0, samples=samples, before=AT_REST, after=after, done={}, course=[],
        reloads=[],
    )  # fmt: skip


def flat() -> list[Sample]:
    dice = random.Random(1)
    return [
        sample(at, fds=dice.randint(90, 110), rss=30_000_000 + dice.randint(0, 10**6)) for at in range(600)
    ]


def test_what_goes_up_and_down_is_flat() -> None:
    assert complaints(record(flat())) == []


def test_warm_up_and_single_moments_do_not_count() -> None:
    samples = flat()
    samples[:110] = [sample(at, rss=20_000_000) for at in range(110)]
    samples[400:410] = [sample(at, rss=90_000_000) for at in range(400, 410)]
    verdict = judge(record(samples), RSS)
    assert verdict.said == "flat"
    assert verdict.most > 50


@pytest.mark.parametrize(
    ("key", "title"), [("rss", "resident memory"), ("fds", "open fds"), ("threads", "threads")]
)
def test_a_leak_is_noticed(key: str, title: str) -> None:
    """A fifth more in the time that counts."""
    busy = getattr(sample(0.0), key)
    samples = [sample(at, **{key: int(busy * (1 + at / 2_400))}) for at in range(600)]
    (complaint,) = complaints(record(samples))
    assert complaint.startswith(f"{title} has risen by 1")


def test_latency_is_the_percentile_of_all_round_trips_of_a_while() -> None:
    samples = [sample(at, echoes=[0.02] + [0.3] * 9) for at in range(600)]
    _, values = series(record(samples), ECHO)
    assert values == [pytest.approx(20.0)] * 30
    slower = [sample(at, echoes=[0.001 * (1 + at / 300)]) for at in range(600)]
    assert judge(record(slower), ECHO).said == "rises"
    short = msgspec.structs.replace(record(slower), seconds=100.0)
    assert judge(short, ECHO).said == "too short"
    busy = [msgspec.structs.replace(one, others=0.5) for one in slower]
    assert judge(record(busy), ECHO).said == "busy"


def test_what_is_left_at_the_end_is_named() -> None:
    after = msgspec.structs.replace(AT_REST, fds=6, spooled=10)
    assert complaints(record(flat(), after)) == [
        "fds: 6 are left, 5 there were",
        "spooled: 10 are left, 0 there were",
    ]


def test_slope_of_nothing_is_none() -> None:
    assert slope([]) == slope([(1.0, 5.0)]) == 0.0
    assert slope([(0.0, 0.0), (1.0, 2.0), (2.0, 4.0), (3.0, 6.0), (4.0, 100.0)]) == 2.0


def test_record_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "build" / "soak.json"
    before = record(flat())
    before.save(path)
    assert Record.load(path) == before
