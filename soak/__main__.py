"""`python -m soak`: clients and VMs keep a daemon busy for minutes or hours, and some of them misbehave."""

import argparse
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.processes import BenchError
from soak.samples import Record, complaints
from soak.stage import Stage

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from soak import picture, table
except ModuleNotFoundError as missing:
    sys.exit(f"soak: {missing.name} is not installed; do: python -m pip install -e '.[bench]'")

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Have many VMs and clients do everything for a long time, and check that nothing grows.",
        epilog="docs/reliability.md says how to read the results.",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="how long (default: %(default)g)"
    )
    parser.add_argument("--vms", type=int, default=16, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument(
        "--replace", type=float, default=0.0, metavar="SECONDS",
        help="have another process take over from the daemon this often (default: never)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(1_000_000), metavar="N",
        help="the seed of the random choices of what is done, and when; it is printed",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, default=Path("build/soak.json"), metavar="FILE", help="all that was measured"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("build/soak.png"),
        metavar="FILE",
        help="a picture, PNG or SVG by its suffix",
    )
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="do nothing, show an older JSON FILE"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    console = Console()
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)
    try:
        record = Record.load(options.source) if options.source else _soak(options, console)
    except BenchError as error:
        console.print(
            f"soak: FAILED (seed {options.seed}): {error}", style="bold red", markup=False, highlight=False
        )
        return 1
    except KeyboardInterrupt:
        console.print("soak: interrupted; everything it had started has ended")
        return 130
    picture.draw(record, options.picture)
    table.show(record, console)
    console.print(
        f"All that was seen is in {options.source or options.json}, the picture is {options.picture}."
    )
    return bool(complaints(record))


def _soak(options: argparse.Namespace, console: Console) -> Record:
    seconds = options.minutes * 60
    console.print(f"seed {options.seed}, {options.minutes:g} minutes, {options.vms} VMs", highlight=False)
    with _progress(console) as progress:
        bar = progress.add_task("", total=seconds)

        def show(done: float, what: str) -> None:
            progress.update(bar, completed=done, description=what)
            progress.refresh()

        record = Stage(seconds, options.vms, options.seed, options.replace).run(show)
    record.save(options.json)
    return record


def _progress(console: Console) -> Progress:
    # Drawn once per second: a bar that moves by itself would take CPU from what is measured.
    return Progress(
        BarColumn(bar_width=None), TextColumn("{task.description:<52}"),
        TextColumn("left:"), TimeRemainingColumn(),
        console=console, auto_refresh=False, transient=True, expand=True, disable=not console.is_terminal,
    )  # fmt: skip


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    # Only once: nothing may interrupt the end of all the processes that were started.
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
