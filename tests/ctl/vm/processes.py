"""Processes of this host, and waiting for them."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    return [
        child for child in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _stat(child)[1] == str(pid)
    ]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def ended(*pids: int) -> bool:
    """Whether processes have ended; nobody may have waited for them yet."""
    return all(_stat(pid)[0] in "ZX" for pid in pids)


def _stat(pid: int) -> tuple[str, str]:
    """Return a process's state and its parent, as /proc has them."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", ""
    return state, parent
