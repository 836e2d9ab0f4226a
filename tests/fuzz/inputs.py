"""The corpus: for each target a file with an input a line, in hexadecimal, those that have a name first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DIRECTORY = Path(__file__).with_name("corpus")


def read(target: str, directory: Path = DIRECTORY) -> list[bytes]:
    """All inputs for a target."""
    return [bytes.fromhex(line.split()[-1]) for line in _lines(target, directory)]


def write(target: str, inputs: Iterable[bytes], directory: Path = DIRECTORY) -> int:
    """Keep those that have a name, and these; returns how many there are."""
    lines = [line for line in _lines(target, directory) if " " in line]
    named = {bytes.fromhex(line.split()[-1]) for line in lines}
    lines += [data.hex() for data in sorted(set(inputs) - named, key=lambda data: (len(data), data)) if data]
    _path(target, directory).write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def _lines(target: str, directory: Path) -> list[str]:
    return _path(target, directory).read_text().splitlines()


def _path(target: str, directory: Path) -> Path:
    return directory / f"{target}.txt"
