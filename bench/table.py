"""The results as a table on the terminal."""

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.figures import Spread
from bench.measure import QUIET
from bench.results import Results, RowResult
from bench.rows import ROWS, Figure

_FIGURES = {row.key: row.figures for row in ROWS}
_WIDTHS = (31, 7, 9, 5, 15)
_THREE_DIGITS = 100

EXPLANATION = (
    "Medians of the rounds. The ratio is ours to the yardstick's in the same round, with its least and most; "
    "green where ours is better. The relay is a process that copies bytes, 64 KiB at a time, and knows "
    "nothing of frames; one hop is the same message sent back by another process. bench/README.md has more."
)


def show(results: Results, console: Console) -> None:
    for group, rows in groupby(results.rows, key=lambda row: row.group):
        measured = [row for row in rows if row.rounds]
        for unit in dict.fromkeys(figure.unit for row in measured for figure in _FIGURES[row.key]):
            console.print(_table(group, unit, measured))
    for text in (EXPLANATION, noise(results), f"{results.caption()}."):
        console.print(text, style="dim", highlight=False)


def noise(results: Results) -> str:
    """Return a sentence on how much CPU other processes took, and what that meant for the rounds."""
    kept = sorted(one.others for row in results.rows for one in row.rounds)
    discarded = sum(len(row.discarded) for row in results.rows)
    noisy = sum(others > QUIET for others in kept)
    return (
        f"Others took {kept[len(kept) // 2]:.2f} cores (median; at most {kept[-1]:.2f}): "
        f"{discarded} of {len(kept) + discarded} rounds of single rows were discarded for more than {QUIET}"
        + (f", and {noisy} such had to be kept: measure again on a quieter machine." if noisy else ".")
    )


def _table(group: str, unit: str, rows: Sequence[RowResult]) -> Table:
    against = next((row.against for row in rows if row.against), "")
    figures = [(row, figure) for row in rows for figure in _FIGURES[row.key] if figure.unit == unit]
    better = "lower is better" if figures[0][1].lower_is_better else "higher is better"
    table = Table(
        title=f"{group}\n[dim]{unit}{f', against {against}' if against else ''}; {better}[/]",
        title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    names = ("", "ours", "yardstick", "ratio", "spread") if against else ("", "ours", "", "", "spread")
    for name, width in zip(names, _WIDTHS, strict=True):
        table.add_column(name, justify="right" if name or width < _WIDTHS[0] else "left", width=width)
    for row, figure in figures:
        table.add_row(*_cells(row, figure))
    return table


def _cells(row: RowResult, figure: Figure) -> tuple[str, ...]:
    name = f"{row.title}, {figure.name}" if figure.name else row.title
    ours = row.ours(figure.key)
    if not row.against:
        return name, number(ours.median), "", "", _range(ours)
    ratio = row.ratio(figure.key)
    better = ratio.median <= 1 if figure.lower_is_better else ratio.median >= 1
    median = f"[green]{number(ratio.median)}[/]" if better else number(ratio.median)
    return name, number(ours.median), number(row.yardstick(figure.key).median), median, _range(ratio)


def _range(figures: Spread) -> str:
    return f"{number(figures.least)} to {number(figures.most)}"


def number(value: float) -> str:
    """Return a number with only those digits that mean something."""
    if value >= _THREE_DIGITS:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= _THREE_DIGITS / 10 else f"{value:.2f}"
