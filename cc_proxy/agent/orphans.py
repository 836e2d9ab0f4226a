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
    """What containers leave behind become this process's children, as they would a guest's init's.

    Only for a process that is the agent's alone: every child it has is taken for one of the agent's.
    Orphans are adopted inside the context.
    """

    def __enter__(self) -> Self:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def reap(self, ours: Container[int]) -> None:
        """Wait for orphans that have ended; not for `ours`, which somebody else waits for."""
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid in ours:
                    break  # it hides those behind it
                os.waitpid(ended.si_pid, 0)
            else:
                return
        for pid in _children():
            if pid not in ours:
                os.waitpid(pid, os.WNOHANG)

    def kill(self) -> None:
        """End all children, those that come to light by that as well, and wait for them."""
        while killed := [pid for pid in _children() if _kill(pid)]:
            for pid in killed:
                os.waitpid(pid, 0)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:  # it has become somebody else: a setuid program
        return False
    return True


def _children() -> Iterator[int]:
    """Find the children in all processes: not every kernel has /proc/PID/task/TID/children."""
    me = os.getpid()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = Path("/proc", name, "stat").read_bytes()
            # The command, in parentheses, may hold anything.
            if int(stat.rpartition(b")")[2].split()[1]) == me:
                yield int(name)
