"""What a test must give back: file descriptors, threads and child processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.adopted import children

# Seconds that threads and children on their way out get. Only a test that leaks waits that long.
GRACE = 2.0
POLL_INTERVAL = 0.01

# The standard streams: pytest's capture puts others in their place between the phases of a test.
STANDARD_FDS = range(3)
# Opened once, at first use, and kept for the life of the process.
KEPT_OPEN = frozenset({"/dev/urandom", "/dev/random"})


@dataclass(frozen=True)
class Snapshot:
    """What the process held at one moment."""

    fds: dict[int, str]
    threads: frozenset[threading.Thread]
    children: frozenset[int]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(_open_fds(), frozenset(threading.enumerate()), frozenset(children()))

    def since(self, before: Snapshot) -> list[str]:
        """Describes what is held now and was not before, one line each."""
        fds = sorted(fd for fd, target in self.fds.items() if before.fds.get(fd) != target)
        threads = sorted(thread.name for thread in self.threads - before.threads)
        children = sorted(self.children - before.children)
        return [
            *(f"fd {fd} -> {self.fds[fd]}" for fd in fds),
            *(f"thread {name}" for name in threads),
            *(f"child process {pid}: {_command(pid)}" for pid in children),
        ]


def leaked_since(before: Snapshot) -> list[str]:
    """Describes what is still held after at most GRACE seconds; empty as soon as nothing is."""
    deadline = time.monotonic() + GRACE
    never = threading.Event()
    while (leaks := Snapshot.take().since(before)) and time.monotonic() < deadline:
        never.wait(POLL_INTERVAL)
    return leaks


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that keeps a file descriptor, a thread or a child process.

    What fixtures of a wider scope hold is theirs: pytest sets those up before this one.
    """
    before = Snapshot.take()
    yield
    if leaks := leaked_since(before):
        pytest.fail("the test leaked " + ", ".join(leaks), pytrace=False)


def _open_fds() -> dict[int, str]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own, or one that another thread has just closed
            continue
        if int(name) not in STANDARD_FDS and target not in KEPT_OPEN:
            fds[int(name)] = target
    return fds


def _command(pid: int) -> str:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "gone meanwhile"
    return " ".join(arguments).strip() or f"({name}), ended and never waited for"
