"""`python -m bench`: measures cc-proxy against a plain relay, and shows the results."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.measure import Rounds, planned
from bench.processes import BenchError
from bench.results import Results, ResultsError
from bench.rows import Row, chosen
from bench.stage import Stage

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from bench import picture, table
except ModuleNotFoundError as missing:
    sys.exit(f"bench: {missing.name} is not installed; do: python -m pip install -e '.[bench]'")

_DEFAULT_JSON = Path("build", "bench.json")
_DEFAULT_PICTURE = Path("build", "bench.svg")
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the proxy, with every byte checked, against a plain relay on the same machine.",
        epilog="bench/README.md says what is done and how to read the results.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="three short rounds: half a minute, coarser figures"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="rounds of each row (default: 5)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW",
        help="measure these rows; shell patterns like 'down-*' are understood, --list has the names",
    )  # fmt: skip
    parser.add_argument(
        "--vm", action="store_true",
        help="instead, measure a real VM under QEMU, with the proxy and without it",
    )  # fmt: skip
    parser.add_argument(
        "--restart", action="store_true",
        help="instead, measure what clients notice when another process replaces the daemon",
    )  # fmt: skip
    parser.add_argument(
        "--service", action="store_true",
        help="with --restart: restart this machine's service with `systemctl restart`; needs root",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    parser.add_argument(
        "--json", type=Path, default=_DEFAULT_JSON, metavar="FILE", help="all figures (default: %(default)s)"
    )
    parser.add_argument(
        "--picture", type=Path, default=_DEFAULT_PICTURE, metavar="FILE",
        help="a picture, SVG or PNG by its suffix (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="measure nothing, show an older JSON FILE"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    console = Console()
    try:
        rows = chosen(options.only)
    except ValueError as error:
        parser.error(f"{error}; --list has the names")
    if options.list:
        for row in rows:
            console.print(f"{row.key:20} {row.group}: {row.title}", highlight=False)
        return 0
    try:
        if options.vm or options.restart:
            (_measure_vm if options.vm else _measure_restarts)(options, console)
            return 0
        results = Results.load(options.source) if options.source else _measure(rows, options, console)
    except (BenchError, ResultsError) as error:
        console.print(f"bench: FAILED: {error}", style="bold red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("bench: interrupted; everything it had started has ended")
        return 130
    _show(results, options, console)
    return 0


def _measure_vm(options: argparse.Namespace, console: Console) -> None:
    from bench import guest  # noqa: PLC0415 - no other benchmark needs what it imports

    guest.main(options.rounds or 3, options.picture, console)


def _measure_restarts(options: argparse.Namespace, console: Console) -> None:
    from bench import pause  # noqa: PLC0415 - as above

    pause.main(options.rounds or 20, options.service, options.picture, console)


def _show(results: Results, options: argparse.Namespace, console: Console) -> None:
    # The files first: if the terminal has gone away, a run of minutes must not be lost.
    if not options.source:
        results.save(options.json)
    picture.draw(results, options.picture)
    table.show(results, console)
    console.print(f"All figures are in {options.source or options.json}, the picture is {options.picture}.")


def _measure(rows: list[Row], options: argparse.Namespace, console: Console) -> Results:
    """Measure the rows. Raises `BenchError`, with the complaints that the daemons have logged."""
    rounds = options.rounds or (3 if options.quick else 5)
    seconds = 0.06 if options.quick else 0.25
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)
    with Stage(seconds) as stage, _progress(console) as progress:
        bar = progress.add_task("", total=planned(rows, rounds))

        def show(done: int, what: str) -> None:
            progress.update(bar, completed=done, description=what)
            progress.refresh()

        all_rounds = Rounds(stage, rows, rounds, show)
        try:
            all_rounds.run()
        except BenchError as error:
            raise BenchError("\n".join([str(error), *stage.complaints()])) from None
    return Results.begin(rounds, seconds, all_rounds.results)


def _progress(console: Console) -> Progress:
    # Drawn only between measurements: a bar that moves by itself would take CPU from what is measured.
    return Progress(
        BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description:<32}"),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
        console=console, auto_refresh=False, transient=True, expand=True, disable=not console.is_terminal,
    )  # fmt: skip


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    # Only once: nothing may interrupt the end of all the processes that were started.
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
