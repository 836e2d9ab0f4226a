"""Sockets in the file system: recognising a file, removing a stale one, and locking its directory."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator

#: Longest path that fits into a socket address, in bytes.
MAX_SOCKET_PATH = 107

#: Device and inode, which tell a file from a later one of the same name.
Identity = tuple[int, int]

#: Seconds to wait for a process that holds the lock (longer than starting takes), and between two tries.
_PATIENCE, _INTERVAL = 2.0, 0.01


def identity(path: str) -> Identity:
    """Return the identity of the file at `path`, without following a link. Raises `OSError`."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove_stale(path: str) -> None:
    """Remove a socket that no process has open. Raises `OSError`, which says if it is something else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is something that is not a socket; it was left alone")
    if _is_alive(path):
        raise OSError(errno.EADDRINUSE, "another process serves this socket; it was left alone")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _is_alive(path: str) -> bool:
    """Whether a process has the socket open.

    A live stream socket refuses a datagram socket because of its type, and its process notices nothing. A
    stream socket would be accepted instead, perhaps as the only peer that a hypervisor takes.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        code = probe.connect_ex(path)
    if code not in (0, errno.EPROTOTYPE, errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(code, os.strerror(code))
    return code in (0, errno.EPROTOTYPE)


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep other starting daemons from checking and replacing the same socket at the same time.

    Any process that may read the directory can lock it and never unlock it. So after two seconds this goes on
    without the lock. Raises `OSError` if the directory cannot be opened.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Lock the file behind an fd, unless another process keeps it locked for longer than starting takes."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_INTERVAL)
