"""A listening socket and its file: never somebody else's file, and never left behind."""

import contextlib
import errno
import os
import socket
import stat

from cc_proxy.agent.errors import ListenError
from cc_proxy.linux.socketfile import Identity, identity, locked

#: The longest path that fits an AF_UNIX address, without the byte that ends it.
MAX_PATH = 107
# One peer is served at a time; the others wait here, connected and never answered.
_BACKLOG = 16


class SocketFile:
    """A listening, non-blocking AF_UNIX stream socket.

    A file that a dead process left is replaced. Raises `ListenError` if the path is too long or in use, or
    cannot be had.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size = len(os.fsencode(path))
        if size > MAX_PATH:
            raise ListenError(f"{path}: a path of {size} bytes is too long for a socket ({MAX_PATH} at most)")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._identity = self._bind()
        except OSError as error:
            self.sock.close()
            raise ListenError(f"{path}: {error.strerror}") from None
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        """Close the socket and remove its file, if the file is still this socket's. No matter if done."""
        with contextlib.suppress(OSError):
            if identity(self.path) == self._identity:
                os.unlink(self.path)
        self.sock.close()

    def _bind(self) -> Identity:
        with locked(os.path.dirname(self.path) or "."):
            _remove_stale(self.path)
            self.sock.bind(self.path)
            bound = identity(self.path)
            self.sock.listen(_BACKLOG)
        return bound


def _remove_stale(path: str) -> None:
    """Remove a socket file that no process has open. Raises `ListenError` for anything else that is there."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path}: is there already and not a socket; it is left alone")
    if _is_alive(path):
        raise ListenError(f"{path}: another process is listening there")
    os.unlink(path)


def _is_alive(path: str) -> bool:
    """Return whether a process has the socket open.

    A stream socket refuses a datagram one as being of the wrong type, but only if it is alive. So whoever
    listens does not notice: a real connect would take the place of its one peer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        code = probe.connect_ex(path)
    if code not in (0, errno.EPROTOTYPE, errno.ECONNREFUSED):
        raise OSError(code, os.strerror(code))
    return code != errno.ECONNREFUSED
