"""The corpus: for each target a file with an input a line, in hexadecimal, those that have a name first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DIRECTORY = Path(__file__).with_name("corpus")


def read(target: str) -> list[bytes]:
    """All inputs for a target."""
    return [bytes.fromhex(line.split()[-1]) for line in _lines(target)]


def write(target: str, inputs: Iterable[bytes]) -> int:
    """Keep those that have a name, and these; returns how many there are."""
    lines = [line for line in _lines(target) if " " in line]
    named = {bytes.fromhex(line.split()[-1]) for line in lines}
    lines += [data.hex() for data in sorted(set(inputs) - named, key=lambda data: (len(data), data)) if data]
    _path(target).write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def _lines(target: str) -> list[str]:
    return _path(target).read_text().splitlines()


def _path(target: str) -> Path:
    return DIRECTORY / f"{target}.txt"
