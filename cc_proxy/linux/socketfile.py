"""Sockets in the file system: which file is whose, and nobody else in the same directory meanwhile."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

#: Longest path that fits into a socket's address, in bytes.
MAX_SOCKET_PATH = 107

#: Which file it is, whatever is called like it later: device and inode.
Identity = tuple[int, int]

#: Seconds that others get to look at a socket and make theirs, more than it takes; and between two looks.
_PATIENCE, _INTERVAL = 2.0, 0.01


def identity(path: str) -> Identity:
    """Return which file stands at `path`, a link itself and not what it leads to. Raises `OSError`."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep others that are starting from looking at, and replacing, the same socket meanwhile.

    Whoever may read the directory can lock it too, and never let go of it: that is not waited for.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Lock what an fd leads to, unless somebody keeps that locked for longer than it takes to start."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_INTERVAL)
