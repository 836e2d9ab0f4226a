"""A record as a table on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from soak.samples import LINES, Record, Verdict, complaints, judge

_COLOURS = {"flat": "green", "rises": "red", "busy": "yellow", "too short": "yellow", "": "default"}
_DONE = ("VMs", "VMs that died", "hellos that failed", "sessions", "connections", "requests", "bytes")


def show(record: Record, console: Console) -> None:
    """Print what was done, each line with its verdict, and what is wrong."""
    console.print(summary(record), highlight=False)
    console.print(_lines(record))
    for text in complaints(record):
        console.print(f"soak: NOT FLAT: {text}", style="bold red", markup=False, highlight=False)


def summary(record: Record) -> str:
    """Return a sentence on what was done."""
    done = [f"{record.done.get(name, 0):,} {name}" for name in _DONE]
    minutes = record.seconds / 60
    return (
        f"cc-proxy {record.version}, {minutes:.3g} minutes, seed {record.seed}: {', '.join(done)}, every one "
        f"of which was checked; settings read again {len(record.reloads)} times, the daemon replaced "
        f"{len(record.replacements)} times."
    )


def _lines(record: Record) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "before", "median", "most", "at the end", "rise", "allowed", ""):
        table.add_column(name, justify="right" if name else "left")
    for line in LINES:
        verdict = judge(record, line)
        table.add_row(*_cells(record, verdict), f"[{_COLOURS[verdict.said]}]{verdict.said}[/]")
    return table


def _cells(record: Record, verdict: Verdict) -> list[str]:
    line = verdict.line
    ends = [getattr(sample, line.key, None) for sample in (record.before, record.after)]
    before, after = ("" if end is None else number(end * line.scale) for end in ends)
    title = f"{line.title}, {line.unit}" if line.unit else line.title
    allowed = "" if line.allowed is None else f"{line.allowed:.0%}"
    middle, most = number(verdict.median), number(verdict.most)
    return [title, before, middle, most, after, f"{verdict.rise:+.1%}", allowed]


def number(value: float) -> str:
    """Return a number with only those digits that mean something."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
