"""The project's locks while a test runs: one that is taken while another is held fails the test.

docs/architecture.md lists them, and says that none is taken while another is held; so there is no order that
could be wrong, and no cycle.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from cc_proxy.log import faults

_MADE = re.compile(r"(?:self\.)?(\w+) = threading\.Lock\(\)")

make_lock = threading.Lock


class LockWatch:
    """Which locks the threads hold, and what was wrong with that."""

    def __init__(self) -> None:
        self._held = threading.local()
        self.mistakes: list[str] = []

    def taken(self, name: str) -> None:
        held = self.held()
        if held:
            thread = threading.current_thread().name
            self.mistakes.append(f"{name} was taken while {held[-1]} was held, by {thread}")
        held.append(name)

    def released(self, name: str) -> None:
        if name in self.held():  # else a test gives back what another of its threads took
            self.held().remove(name)

    def held(self) -> list[str]:
        """Of the thread that asks."""
        names: list[str] = self._held.__dict__.setdefault("names", [])
        return names


class WatchedLock:
    """A lock of the project's."""

    def __init__(self, name: str, watch: LockWatch) -> None:
        self.name = name
        self._watch = watch
        self._lock = make_lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._watch.taken(self.name)
        return taken

    def release(self) -> None:
        self._watch.released(self.name)
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()


def lock_of(owner: object) -> WatchedLock:
    """The lock of an object, to be held as by a thread that hangs."""
    (lock,) = (value for value in vars(owner).values() if isinstance(value, WatchedLock))
    return lock


@pytest.fixture(autouse=True)
def watched_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[LockWatch]:
    """Fails a test in which a lock was taken while another was held, or is held at the end by its thread."""
    watch = LockWatch()

    def make() -> object:
        frame = sys._getframe(1)  # who makes it, and in which line, nothing else tells
        if not str(frame.f_globals.get("__name__")).startswith("cc_proxy."):
            return make_lock()
        made = _MADE.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
        assert made, "a lock is made in a line of its own, so that it has a name"
        return WatchedLock(f"{type(frame.f_locals['self']).__name__}.{made[1]}", watch)

    monkeypatch.setattr(threading, "Lock", make)
    monkeypatch.setattr(faults, "_lock", WatchedLock("faults._lock", watch))
    yield watch
    if mistakes := [*watch.mistakes, *(f"{name} is still held" for name in watch.held())]:
        pytest.fail("; ".join(mistakes), pytrace=False)
