"""The benchmark's arithmetic, and the file its results are kept in."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.figures import Spread, latencies, percentile, spread
from bench.results import Results, ResultsError, Round, RowResult
from bench.rows import ROWS, chosen


def test_spread() -> None:
    assert spread([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)


@pytest.mark.parametrize(("share", "found"), [(0.5, 50), (0.99, 99), (0.999, 100), (0.001, 1)])
def test_percentile_is_the_least_sample_that_covers_the_share(share: float, found: int) -> None:
    assert percentile(range(1, 101), share) == found


def test_percentile_of_one() -> None:
    assert percentile([7], 0.999) == 7


def test_latencies() -> None:
    found = latencies([3000, 1000, 2000])
    assert found == {"p50": 2, "p90": 3, "p99": 3, "p999": 3, "count": 3, "rate": 500_000}


class TestRowResult:
    def test_ratios_are_those_of_single_rounds(self) -> None:
        row = RowResult.of(ROWS[0])
        row.rounds = [
            Round(0.0, {"mb_per_s": ours}, {"mb_per_s": relay}) for ours, relay in ((5, 10), (9, 3), (1, 4))
        ]
        assert row.ratio("mb_per_s") == Spread(0.5, 0.25, 3)
        assert row.ours("mb_per_s") == Spread(5, 1, 9)
        assert row.yardstick("mb_per_s") == Spread(4, 3, 10)

    def test_results_come_back_from_their_file(self, tmp_path: Path) -> None:
        row = RowResult.of(ROWS[0])
        row.rounds.append(Round(0.1, {"mb_per_s": 1.5}, {"mb_per_s": 3.0}))
        row.discarded.append(Round(0.5, {"mb_per_s": 1.0}, {}))
        results = Results.begin(1, 0.25, [row, RowResult.of(ROWS[1])])
        results.save(tmp_path / "new" / "bench.json")
        assert '"ratio": ' in (tmp_path / "new" / "bench.json").read_text()
        assert Results.load(tmp_path / "new" / "bench.json") == results

    @pytest.mark.parametrize("text", ["", "[]", '{"date": 5}'])
    def test_other_files_are_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "bench.json"
        path.write_text(text)
        with pytest.raises(ResultsError, match="not results of this benchmark"):
            Results.load(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ResultsError, match="No such file"):
            Results.load(tmp_path / "bench.json")


class TestRows:
    def test_names_are_unique(self) -> None:
        assert len({row.key for row in ROWS}) == len(ROWS)

    def test_sessions_are_spread_evenly(self) -> None:
        assert all(row.sessions % row.vms == 0 for row in ROWS)

    def test_all_are_chosen_unless_some_are(self) -> None:
        assert chosen([]) == list(ROWS)
        assert [row.key for row in chosen(["echo", "vms-?"])] == ["echo", "vms-1", "vms-2", "vms-4", "vms-8"]

    def test_a_name_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="'nothing'"):
            chosen(["echo", "nothing"])
