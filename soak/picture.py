"""A record as a picture: what should stay flat, over time, and below it what went on meanwhile."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.picture import BLUE, GREEN, ORANGE, RED, STYLE
from soak.samples import LINES, WARM_UP, Record, Sample, judge, series
from soak.table import summary

_SIZE = (10.0, 10.5)
_BY_KEY = {line.key: line for line in LINES}
_GREY = "#777777"
#: Seconds over which what went on is averaged.
_WINDOW = 10
_BESIDE: Any = {"loc": "upper left", "bbox_to_anchor": (1.04, 1.0)}


def draw(record: Record, path: Path) -> None:
    """Draw the picture, in the format that the suffix of the file says."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        panels = figure.subplots(5, 1, sharex=True, height_ratios=(1, 1, 1, 1.2, 0.9))
        _memory(panels[0], record)
        _counts(panels[1], record)
        _spool(panels[2], record)
        _latencies(panels[3], record)
        _load(panels[4], record)
        for axes in panels:
            axes.axvspan(0, WARM_UP * record.seconds / 60, color="#f4f4f4", zorder=0)
            axes.margins(x=0)
        panels[-1].set_xlabel("minutes")
        figure.supxlabel(_caption(record), fontsize=8, color="#444444")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {})


def _caption(record: Record) -> str:
    return "\n".join(wrap(summary(record), 130)) + (
        "\nGrey: warm-up. Percentages: by how much a line has risen from there to the end (median slope). "
        "Dotted: the daemon before and after."
    )


def _memory(axes: Axes, record: Record) -> None:
    axes.set(title="Memory", ylabel="MB")
    _line(axes, record, "rss", "resident", BLUE)
    _line(axes, record, "pss", "its share of what is shared (PSS)", GREEN)
    _ends(axes, record, "rss", BLUE)
    _finish(axes)


def _counts(axes: Axes, record: Record) -> None:
    axes.set(title="Fds and threads")
    _line(axes, record, "fds", "fds", BLUE)
    _line(axes, record, "threads", "threads", ORANGE)
    _ends(axes, record, "fds", BLUE)
    _ends(axes, record, "threads", ORANGE)
    axes.plot(
        _minutes(record.samples),
        [one.sessions for one in record.samples],
        color=_GREY,
        lw=0.8,
        label="sessions",
    )
    _finish(axes)


def _spool(axes: Axes, record: Record) -> None:
    axes.set(title="Output that waits on disk for clients that do not read", ylabel="MB")
    _line(axes, record, "spooled", "in the spool", GREEN)
    _finish(axes)


def _latencies(axes: Axes, record: Record) -> None:
    axes.set(title="Round trips of a client that does nothing else", ylabel="ms")
    for name, color in (("echo", BLUE), ("ping", RED)):
        for share, what, style in (
            ("p10", "fastest tenth", "-"),
            ("p50", "median", "--"),
            ("p99", "p99", ":"),
        ):
            line = _BY_KEY[f"{name} {share}"]
            times, values = series(record, line, bins=60)
            label = f"{name}, {what}" if line.allowed is None else _label(record, line.key, f"{name}, {what}")
            width = 1.0 if line.allowed is None else 1.8
            axes.plot([at / 60 for at in times], values, color=color, linestyle=style, lw=width, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(**_BESIDE)


def _load(axes: Axes, record: Record) -> None:
    """Draw what the worlds did, when VMs died and settings were read again, and what others did."""
    axes.set(title="What went on", ylabel="MB/s")
    times, rates = [], []
    for (begin, before, _), (end, after, _) in zip(record.course, record.course[_WINDOW:], strict=False):
        times.append((begin + end) / 120)
        rates.append((after - before) / (end - begin) / 1e6)
    axes.plot(times, rates, color=GREEN, label="bytes that arrived")
    deaths = [
        at / 60
        for (_, _, before), (at, _, after) in zip(record.course, record.course[1:], strict=False)
        for _ in range(after - before)
    ]
    axes.set_ylim(bottom=0, top=max([1.0, *rates]) * 1.6)
    _marks(axes, deaths, 0.92, RED, f"a VM dies: {len(deaths)}")
    _marks(axes, [at / 60 for at in record.reloads], 0.78, BLUE, f"SIGHUP: {len(record.reloads)}")
    if record.replacements:
        times = [at / 60 for at in record.replacements]
        _marks(axes, times, 0.64, ORANGE, f"another process goes on: {len(times)}")
    _others(axes, record)
    axes.legend(**_BESIDE)


def _others(axes: Axes, record: Record) -> None:
    """Draw how many cores other processes took, as a shaded area with an axis of its own."""
    shade: Any = axes.twinx()
    shade.set(ylim=(0, 4))
    shade.grid(visible=False)
    shade.yaxis.set_ticks([0, 2])
    every = [one.others for one in record.samples]
    shade.fill_between(_minutes(record.samples), every, color=_GREY, alpha=0.25, linewidth=0)
    axes.fill_between([], [], color=_GREY, alpha=0.25, linewidth=0, label="cores that others took (right)")


def _marks(axes: Axes, times: Sequence[float], height: float, color: str, label: str) -> None:
    top = axes.get_ylim()[1]
    style: dict[str, Any] = {"linestyle": "", "marker": "|", "markersize": 8, "color": color, "label": label}
    axes.plot(times, [height * top] * len(times), **style)


def _line(axes: Axes, record: Record, key: str, label: str, color: str) -> None:
    """Draw all samples as a thin line, and over it the median of each stretch of time."""
    line = _BY_KEY[key]
    every = [getattr(sample, key) * line.scale for sample in record.samples]
    axes.plot(_minutes(record.samples), every, color=color, alpha=0.3, lw=0.8)
    times, values = series(record, line)
    axes.plot([at / 60 for at in times], values, color=color, label=_label(record, key, label))


def _ends(axes: Axes, record: Record, key: str, color: str) -> None:
    for sample in (record.before, record.after):
        axes.axhline(getattr(sample, key) * _BY_KEY[key].scale, color=color, linestyle=":", lw=1)


def _label(record: Record, key: str, label: str) -> str:
    return f"{label}: {judge(record, _BY_KEY[key]).rise:+.1%}"


def _minutes(samples: Sequence[Sample]) -> list[float]:
    return [sample.at / 60 for sample in samples]


def _finish(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(**_BESIDE)
