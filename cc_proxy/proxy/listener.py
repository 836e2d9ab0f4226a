"""The socket the daemon listens on, where it makes that itself."""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator

from cc_proxy.proxy.server import BACKLOG
from cc_proxy.proxy.vm import MAX_PATH

_DIRECTORY_MODE = 0o750
_SOCKET_UMASK = 0o117  # leaves 0660


class ListenError(Exception):
    """The daemon cannot listen where it should; the text says why."""


class Listener:
    """A listening socket at a path, which belongs to this process and goes with it."""

    def __init__(self, path: str) -> None:
        """Bind and listen. Raises `ListenError`.

        Changes the process's umask for a moment: to be called while there is only one thread.
        """
        self._path = path
        if len(os.fsencode(path)) > MAX_PATH:
            raise ListenError(f"{path}: a path of {len(os.fsencode(path))} bytes, the limit is {MAX_PATH}")
        try:
            directory = os.path.dirname(path)
            if not os.path.isdir(directory):
                os.makedirs(directory)
                os.chmod(directory, _DIRECTORY_MODE)
            with _locked(directory):
                _remove_stale(path)
                self.socket = _bind(path)
                status = os.lstat(path)
        except OSError as error:
            raise ListenError(f"{path}: cannot listen: {error.strerror}") from None
        self._identity = (status.st_dev, status.st_ino)

    def remove(self) -> None:
        """Remove the socket from the file system, if what stands there is still this one. Never raises."""
        with contextlib.suppress(OSError):
            status = os.lstat(self._path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self._path)


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Keep other daemons that are starting from looking at, and replacing, the same socket meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody serves. Raises `ListenError` for anything else that is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path}: there is something that is not a socket; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody serves it
    raise ListenError(f"{path}: another process serves this socket; it was left alone")


def _bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(_SOCKET_UMASK)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)
    return sock
