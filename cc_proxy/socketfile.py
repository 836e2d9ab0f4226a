"""Sockets in the file system: which file is whose, and nobody else in the same directory meanwhile."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

#: Which file it is, whatever is called like it later: device and inode.
Identity = tuple[int, int]


def identity(path: str) -> Identity:
    """Return which file stands at `path`, a link itself and not what it leads to. Raises `OSError`."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep others that are starting from looking at, and replacing, the same socket meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
