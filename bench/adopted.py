"""Processes whose own parents have ended: a daemon that another one has started to go on in its place."""

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
def adopting_orphans() -> Iterator[None]:
    """Become the parent of processes whose own ends meanwhile."""
    prctl = ctypes.CDLL(None).prctl
    assert not prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def dialers() -> set[int]:
    """The children of this process that connect for a daemon: this one's own, and what daemons have left."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            name, _, fields = entry.read_text().partition("(")[2].rpartition(")")
            if name == "cc-proxy-dial" and int(fields.split()[1]) == os.getpid():
                found.add(int(entry.parent.name))
    return found


def reap(pids: set[int]) -> None:
    """Let go of children that have ended, or are about to."""
    for pid in pids:
        os.waitpid(pid, 0)


class Adopted:
    """A process that was started by another one, as if it were a `subprocess.Popen`."""

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
