"""Real shortages of the process that runs the tests: no fd, no thread, no room on the disk."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

#: More than the address space has.
_TOO_LARGE_A_STACK = 1 << 47


@contextmanager
def few_fds(free: int = 0) -> Iterator[None]:
    """So many fds are left, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        highest = max(map(int, os.listdir("/proc/self/fd"))) + 1
        while (fd := os.eventfd(0)) < highest:
            stack.callback(os.close, fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def no_threads() -> Iterator[None]:
    """No thread can be started."""
    before = threading.stack_size(_TOO_LARGE_A_STACK)
    try:
        yield
    finally:
        threading.stack_size(before)


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file grows beyond that. What is written there fails with EFBIG, as it would with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(path: Path, limit: str) -> Iterator[None]:
    """A tmpfs at `path`, with `size=` or `nr_inodes=`. Skips the test where nothing can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("only root can mount a small disk, and not everywhere")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # files without a name may be open
