"""`python -m tests.fuzz`: fuzzes the targets, each in a process of its own, and says what came of it.

Whatever is found goes to build/fuzz/crashes/TARGET; `--replay FILE` runs it again, and needs no atheris.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.choices import Choices
from tests.fuzz.inputs import read, write
from tests.fuzz.targets import TARGETS, load

_BUILD = Path("build", "fuzz")
#: Longest input, in bytes: the decisions that it is taken for make far more of it.
_LONGEST = 2_000
#: Seconds that one input may take.
_TIMEOUT = 25
#: Runs that are cut off if they have not ended by themselves that much later, in seconds.
_GRACE = 120


class Outcome(NamedTuple):
    """What came of fuzzing one target."""

    target: str
    executions: int
    inputs: int
    found: list[Path]
    failed: bool

    def __str__(self) -> str:
        return f"{self.target:10} {self.executions:>11,} executions, {self.inputs:>5} inputs, " + (
            "FAILED" if self.failed else "nothing found"
        )


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    targets = options.targets or list(TARGETS)
    if options.replay:
        return _replay(options.replay)
    if importlib.util.find_spec("atheris") is None:
        print(
            f"fuzz: skipped: atheris is not installed (it is made for some Pythons only; this is {_python()})"
        )
        return 0
    if options.curate:
        return sum(map(_curate, targets))
    return _fuzz(targets, options.seconds, options.jobs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", choices=[[], *TARGETS], help=", ".join(TARGETS)
    )  # argparse looks for the empty list, too, among the choices
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="targets at once (default: CPUs)"
    )
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="only run inputs again")
    parser.add_argument(
        "--curate", action="store_true", help="make the corpus the fewest inputs that reach what is reached"
    )
    return parser


def _python() -> str:
    return f"{sys.implementation.name} {sys.version.split()[0]} on {os.uname().machine}"


def _fuzz(targets: Iterable[str], seconds: int, jobs: int) -> int:
    with ThreadPoolExecutor(jobs) as executor:
        outcomes = []
        for outcome in executor.map(lambda target: fuzz(target, seconds), targets):
            print(outcome, flush=True)
            outcomes.append(outcome)
    failed = [outcome for outcome in outcomes if outcome.failed]
    for outcome in failed:
        print(f"\n{outcome.target}: the end of {_log(outcome.target)}:")
        print("\n".join(_log(outcome.target).read_text(errors="replace").splitlines()[-25:]))
        for path in outcome.found:
            print(f"again: python -m tests.fuzz --replay {path}")
    print(f"{sum(outcome.executions for outcome in outcomes):,} executions; {len(failed)} targets failed")
    return bool(failed)


def fuzz(target: str, seconds: int) -> Outcome:
    """Fuzz one target for so long, from what is in the corpus and was found before."""
    crashes, grown = _directory("crashes", target), _directory("corpus", target)
    before = set(crashes.iterdir())
    times = [f"-max_total_time={seconds}", f"-timeout={_TIMEOUT}"]
    status = _work(target, [*times, f"-artifact_prefix={crashes}/", grown, _unpacked(target)], seconds)
    log = _log(target).read_text(errors="replace")
    executions = [int(number) for number in re.findall(r"^#(\d+)\t", log, re.MULTILINE)]
    found = sorted(set(crashes.iterdir()) - before)
    inputs = len(list(grown.iterdir()))
    return Outcome(target, max(executions, default=0), inputs, found, failed=bool(status or found))


def _work(target: str, arguments: Iterable[str | Path], seconds: int) -> int:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.worker",
        target,
        f"-max_len={_LONGEST}",
        "-len_control=10",
        "-report_slow_units=1000000",  # an input that takes long is no finding until it takes `_TIMEOUT`
        *map(str, arguments),
    ]
    with _log(target).open("wb") as log:
        try:
            return subprocess.run(
                command, stdout=log, stderr=log, timeout=seconds + _GRACE, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return 1


def _replay(paths: Iterable[Path]) -> int:
    """The directory says which target an input is for."""
    for path in paths:
        load(path.resolve().parent.name)(Choices(path.read_bytes()))
        print(f"{path}: nothing wrong")
    return 0


def _curate(target: str) -> int:
    """Keep what is needed of the corpus and of what was found; what has a name stays."""
    shutil.rmtree(_directory("merged", target))
    merged = _directory("merged", target)
    status = _work(
        target, ["-set_cover_merge=1", merged, _unpacked(target), _directory("corpus", target)], 600
    )
    found = {path.read_bytes() for path in merged.iterdir()}
    if status or not found:
        print(f"{target}: not curated, see {_log(target)}")
        return 1
    print(f"{target:10} {write(target, found):>4} inputs")
    return 0


def _unpacked(target: str) -> Path:
    """The corpus as libFuzzer wants it."""
    directory = _directory("seeds", target)
    for number, data in enumerate(read(target)):
        (directory / str(number)).write_bytes(data)
    return directory


def _directory(kind: str, target: str) -> Path:
    path = _BUILD / kind / target
    path.mkdir(parents=True, exist_ok=True)
    return path


def _log(target: str) -> Path:
    return _BUILD / f"{target}.log"


if __name__ == "__main__":
    sys.exit(main())
