"""The results as a picture: four panels, large enough to be read in a README."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.figures import Spread
from bench.results import Results, RowResult
from bench.rows import INPUT_PAYLOADS, OUTPUT_PAYLOADS, SESSION_COUNTS, VM_COUNTS

# Any: matplotlib's newer types want each key as a literal, the older ones a plain dict.
STYLE: Any = {
    "font.size": 9,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.hashsalt": "cc-proxy",  # the same results give the same file
}
# Colours that can be told apart with any kind of colour vision (Okabe and Ito).
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
_RELAY: dict[str, Any] = {"color": "#777777", "linestyle": "--", "marker": "s"}
_SIZE = (10.0, 8.6)
_PERCENTILES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9"}

_Place = Literal["lower right", "upper left"]
Pick = Callable[[RowResult], Spread]


def draw(results: Results, path: Path) -> None:
    """Draw the picture, in the format that the suffix of the file says, such as `.svg` or `.png`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.0, 1.1), hspace=0.04).flat
        by_size, by_percentile = upper.subplots(1, 2)
        by_sessions, by_vms = lower.subfigures(1, 2, squeeze=False).flat
        _frame_sizes(by_size, results)
        _latencies(by_percentile, results)
        _cost(by_sessions, results, "sessions", SESSION_COUNTS, "Cost of more sessions on one VM")
        _cost(by_vms, results, "vms", VM_COUNTS, "Cost of more VMs, 4 sessions each")
        figure.supxlabel(
            f"{results.caption()}\nMedians, shaded from the least to the most of all rounds.",
            fontsize=8, color="#444444",
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {})


def _frame_sizes(axes: Axes, results: Results) -> None:
    relayed = [results.row(f"down-{size}-x1") for size in OUTPUT_PAYLOADS]
    _line(axes, OUTPUT_PAYLOADS, relayed, _yardstick("mb_per_s"), "plain relay", **_RELAY)
    for pattern, payloads, label, color in (
        ("down-{}-x{}", OUTPUT_PAYLOADS, "VM to {} client{}", BLUE),
        ("up-{}-x{}", INPUT_PAYLOADS, "{} client{} to VM", ORANGE),
    ):
        for clients, which, dashes in ((1, "", "-"), (16, "s in turn", ":")):
            rows = [results.row(pattern.format(size, clients)) for size in payloads]
            style = {"color": color, "linestyle": dashes, "marker": "o"}
            _line(axes, payloads, rows, _ours("mb_per_s"), label.format(clients, which), **style)
    axes.set(title="Throughput", xlabel="payload of a frame, bytes", ylabel="MB/s of payload")
    _log_x(axes, OUTPUT_PAYLOADS)
    _log_y(axes)
    _legend(axes, loc="lower right")


def _latencies(axes: Axes, results: Results) -> None:
    shown = (
        ("echo", False, "plain relay", _RELAY),
        ("echo", True, "nothing else going on", {"color": BLUE, "marker": "o"}),
        ("echo-idle", True, "1000 idle sessions", {"color": GREEN, "marker": "^"}),
        ("echo-stall", True, "a stalled neighbour", {"color": RED, "marker": "v"}),
    )
    for key, ours, label, style in shown:
        row = results.row(key)
        if row and row.rounds:
            spreads = [row.ours(name) if ours else row.yardstick(name) for name in _PERCENTILES]
            _plot(axes, range(len(_PERCENTILES)), spreads, label, **style)
    axes.set(title="Echo of one 64 B frame", xlabel="percentile of round trips", ylabel="µs")
    axes.set_xticks(range(len(_PERCENTILES)), list(_PERCENTILES.values()))
    _log_y(axes)
    _legend(axes, loc="upper left")


def _cost(panel: SubFigure, results: Results, prefix: str, counts: Sequence[int], title: str) -> None:
    """Draw throughput above CPU time, over a common axis."""
    throughput, cpu = panel.subplots(2, 1, sharex=True)
    rows = [results.row(f"{prefix}-{count}") for count in counts]
    for axes, key in ((throughput, "mb_per_s"), (cpu, "cpu")):
        _line(axes, counts, rows, _yardstick(key), "plain relay", **_RELAY)
        _line(axes, counts, rows, _ours(key), "cc-proxy", color=BLUE, marker="o")
        axes.set_ylim(bottom=0)
    throughput.set(title=title, ylabel="MB/s, 1 KiB frames")
    cpu.set(xlabel=f"{'VMs' if prefix == 'vms' else prefix} that stream at once", ylabel="CPU, ms per MB")
    _log_x(cpu, counts)
    _legend(cpu, loc="upper left")


def _ours(figure: str) -> Pick:
    return lambda row: row.ours(figure)


def _yardstick(figure: str) -> Pick:
    return lambda row: row.yardstick(figure)


def _line(
    axes: Axes, xs: Sequence[int], rows: Sequence[RowResult | None], pick: Pick, label: str, **style: Any
) -> None:
    measured = [(x, pick(row)) for x, row in zip(xs, rows, strict=True) if row and row.rounds]
    if measured:
        _plot(axes, [x for x, _ in measured], [one for _, one in measured], label, **style)


def _plot(axes: Axes, xs: Sequence[int], spreads: Sequence[Spread], label: str, **style: Any) -> None:
    axes.plot(xs, [one.median for one in spreads], label=label, **style)
    least, most = [one.least for one in spreads], [one.most for one in spreads]
    axes.fill_between(xs, least, most, color=style["color"], alpha=0.12, linewidth=0)


def _log_x(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    axes.set_yticks([step for step in steps if low <= step <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, loc: _Place) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=loc)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
