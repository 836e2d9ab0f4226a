"""The socket the daemon listens on, where it makes that itself."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

from cc_proxy.linux.fds import refuse_rights
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH, identity, locked
from cc_proxy.log.levels import logger

#: Connections that may wait to be accepted.
_BACKLOG = 4096

#: For the daemon's own group, or for all users.
_DIRECTORY_MODES = (0o750, 0o755)
_SOCKET_UMASKS = (0o117, 0o111)  # leave 0660 and 0666
#: What is above the directory keeps nobody out: leaves 0755.
_PARENTS_UMASK = 0o022


class ListenError(Exception):
    """The daemon cannot listen where it should; the text says why."""


class Listener:
    """Owner of the listening socket, and of its place in the file system if it was made here."""

    def __init__(self, sock: socket.socket, path: str | None = None, *, for_all: bool = False) -> None:
        """Take over a socket that listens; `path` is where it stands, if it is to go with this process."""
        refuse_rights(sock)
        sock.setblocking(False)  # more are accepted than have been announced
        self.socket = sock
        #: Whether the socket was made here and nobody will listen on it after this process.
        self.own = path is not None
        self._path = path  # None once it has been removed
        self._identity = identity(path) if path else None
        self._for_all = for_all

    @classmethod
    def bind(cls, path: str, *, for_all: bool = False) -> "Listener":
        """Listen at `path`, for the daemon's own group or for all users. Raises `ListenError`.

        Changes the process's umask for a moment: to be called while there is only one thread.
        """
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ListenError(
                f"{path}: a path of {len(os.fsencode(path))} bytes, the limit is {MAX_SOCKET_PATH}"
            )
        try:
            directory = os.path.dirname(path)
            if not os.path.isdir(directory):
                with _umask(_PARENTS_UMASK):
                    os.makedirs(directory)
                os.chmod(directory, _DIRECTORY_MODES[for_all])
            with locked(directory):
                _remove_stale(path)
                listener = cls(_bind(path, _SOCKET_UMASKS[for_all]), path, for_all=for_all)
            if for_all:
                _look_at_directory(path)
            return listener
        except OSError as error:
            raise ListenError(f"{path}: cannot listen: {error.strerror}") from None

    def open_to(self, *, for_all: bool) -> None:
        """Let the daemon's own group alone, or all users, connect to an own socket. Never raises."""
        if self._path is None or for_all == self._for_all:
            return
        try:
            if identity(self._path) == self._identity:
                os.chmod(self._path, 0o777 & ~_SOCKET_UMASKS[for_all])
            self._for_all = for_all
        except OSError as error:
            fields = {"socket": self._path, "error": error.strerror}
            logger.warning("the socket's permissions cannot be changed", extra=fields)
            return
        if for_all:
            _look_at_directory(self._path)

    def remove(self) -> None:
        """Remove an own socket from the file system, if what stands there is still it. Never raises.

        The first time only: after that the inode may be another daemon's socket, that listens there by now.
        """
        path, self._path = self._path, None
        with contextlib.suppress(OSError):
            if path and identity(path) == self._identity:
                os.unlink(path)


def _look_at_directory(path: str) -> None:
    """Say so if a directory keeps out some of those whom the settings let in. Raises `OSError`."""
    directory = os.path.dirname(path)
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if not mode & stat.S_IXOTH:
        logger.warning(
            "[access] names others, but only its group can reach what is in the socket's directory",
            extra={"directory": directory, "mode": f"{mode:04o}"},
        )


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
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:  # whoever served it has just removed it
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody serves it
    raise ListenError(f"{path}: another process serves this socket; it was left alone")


def _bind(path: str, umask: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _umask(umask):
            sock.bind(path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _umask(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)
