"""Sockets in the file system: recognising a file, and locking its directory."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

#: Longest path that fits into a socket address, in bytes.
MAX_SOCKET_PATH = 107

#: Device and inode: they tell a file from another one that later has the same name.
Identity = tuple[int, int]

#: Seconds to wait for another process that holds the lock, longer than starting takes; and between two tries.
_PATIENCE, _INTERVAL = 2.0, 0.01


def identity(path: str) -> Identity:
    """Return the identity of the file at `path`, without following a link. Raises `OSError`."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep other daemons that are starting from checking and replacing the same socket meanwhile.

    Anybody who may read the directory can also lock it, and never unlock it. So after a while this goes on
    without the lock.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Lock the file behind an fd, unless somebody keeps it locked for longer than starting takes."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_INTERVAL)
