"""Processes whose parents have ended, such as a daemon that the one before has started as its successor."""

import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def adopting_orphans() -> Iterator[set[int]]:
    """Become the parent of descendants whose own parents end; yields the set of their pids, filled last."""
    prctl = ctypes.CDLL(None).prctl
    before = set(children())
    orphans: set[int] = set()
    assert not prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield orphans
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        orphans |= set(children()) - before


def children() -> Iterator[int]:
    """Yield the pids of this process's children, including zombies."""
    # From each process's stat: not every kernel has /proc/PID/task/TID/children.
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has just ended
            # The command's name, in parentheses, may contain blanks and parentheses.
            _state, parent, *_ = entry.read_text(errors="replace").rpartition(")")[2].split()
            if int(parent) == os.getpid():
                yield int(entry.parent.name)


def reap(pids: set[int], timeout: float) -> None:
    """Wait until children that are about to end have ended. Raises `TimeoutError` if one does not end."""
    for pid in pids:
        try:
            Adopted(pid).wait(timeout)
        except subprocess.TimeoutExpired:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            raise TimeoutError(f"{name} ({pid}) has not ended within {timeout} seconds") from None


class Adopted:
    """A process that another one has started, with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            fd = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                if not poll.poll(timeout and timeout * 1000):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            finally:
                os.close(fd)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
