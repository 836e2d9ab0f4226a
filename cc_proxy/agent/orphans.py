"""Processes whose parents ended before them. They belong to the VM too, and end with it."""

import ctypes
import os
import signal
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

_PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None).prctl


class Orphans:
    """Inside the context, orphans become this process's children, as they become those of a guest's init.

    Only for a process that has no children but the agent's: it takes every child for one of them.
    """

    def __enter__(self) -> Self:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def reap(self, ours: Container[int]) -> None:
        """Wait for orphans that have ended; not for `ours`, which the agent waits for elsewhere."""
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid in ours:
                    break  # waitid would return it again and again, and never an orphan
                os.waitpid(ended.si_pid, 0)
            else:
                return
        for pid in _children():
            if pid not in ours:
                os.waitpid(pid, os.WNOHANG)

    def kill(self) -> None:
        """End all children and wait for them, including those that are orphaned on the way."""
        while killed := [pid for pid in _children() if _kill(pid)]:
            for pid in killed:
                os.waitpid(pid, 0)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:  # a setuid program runs as another user
        return False
    return True


def _children() -> Iterator[int]:
    """Search all processes for children: not every kernel has /proc/PID/task/TID/children."""
    me = os.getpid()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = Path("/proc", name, "stat").read_bytes()
            # The command, in parentheses, may contain anything.
            if int(stat.rpartition(b")")[2].split()[1]) == me:
                yield int(name)
