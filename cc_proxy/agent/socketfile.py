"""A listening socket and its file. It never replaces a file in use, and leaves none behind."""

import contextlib
import os
import socket

from cc_proxy.agent.errors import CannotListen
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH, Identity, identity, locked, remove_stale

# One peer is served at a time. The others wait here, connected but not answered.
_BACKLOG = 16


class SocketFile:
    """A listening, non-blocking AF_UNIX stream socket.

    Replaces a socket that a dead process left. Raises `CannotListen` if the path is too long, in use, or not
    available for another reason.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size = len(os.fsencode(path))
        if size > MAX_SOCKET_PATH:
            raise CannotListen(
                f"{path}: a path of {size} bytes is too long for a socket ({MAX_SOCKET_PATH} at most)"
            )
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._identity = self._bind()
        except OSError as error:
            self.sock.close()
            raise CannotListen(f"{path}: {error.strerror}") from None
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        """Close the socket, and remove its file if that is still its own. May be called more than once."""
        with contextlib.suppress(OSError):
            if identity(self.path) == self._identity:
                os.unlink(self.path)
        self.sock.close()

    def _bind(self) -> Identity:
        with locked(os.path.dirname(self.path) or "."):
            remove_stale(self.path)
            self.sock.bind(self.path)
            bound = identity(self.path)
            self.sock.listen(_BACKLOG)
        return bound
