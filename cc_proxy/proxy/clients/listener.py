"""The socket on which the daemon listens, and its file."""

import contextlib
import os
import select
import socket
import stat
from collections.abc import Iterator

from cc_proxy.continuity.state.clients import ListenerState
from cc_proxy.linux.fds import Fd, refuse_rights
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH, Identity, identity, locked, remove_stale
from cc_proxy.log.levels import logger

#: For the daemon's own group only, and for all users.
_DIRECTORY_MODES = (0o750, 0o755)
_SOCKET_UMASKS = (0o117, 0o111)  # leave 0660 and 0666

#: What to do if a socket that systemd has made cannot be found.
_RESTART = "`systemctl restart cc-proxy.socket` makes it again; this restarts cc-proxy too"


class ListenError(Exception):
    """The daemon cannot listen where it should; the text says why."""


class Listener:
    """Owns the listening socket, and its file if the daemon made it. Main thread.

    Other threads may accept on `socket`, which keeps its fd as long as this lives.
    """

    def __init__(self, sock: socket.socket, path: str | None = None, *, for_all: bool = False) -> None:
        """Take over a socket that listens. `path` is that of its file, if the daemon made it."""
        _prepare(sock)
        self.socket = sock
        #: Whether the daemon made the socket. Then nothing listens on it after this process.
        self.own = path is not None
        self._path = path or _path_of(sock)  # None if there is none, or it has been removed
        self._identity = _seen_at(self._path)
        self._for_all = for_all
        self._trouble = ""  # why nobody can connect, as last logged

    @classmethod
    def bind(cls, path: str, *, for_all: bool = False) -> "Listener":
        """Listen at `path`, for the daemon's own group or for all users. Raises `ListenError`."""
        return cls(_listen(path, for_all=for_all), path, for_all=for_all)

    @classmethod
    def from_state(cls, state: ListenerState) -> "Listener":
        """Return a listener that goes on where the previous process stood."""
        return cls(socket.socket(fileno=state.fd.number), state.path, for_all=state.for_all)

    def hand_over(self) -> ListenerState:
        """Give up the socket, and its place in the file system, as a value for `from_state`."""
        state, self._path = self.state, None
        self.socket.detach()
        return state

    @property
    def state(self) -> ListenerState:
        """The socket, which this listener still owns, and its place in the file system."""
        return ListenerState(Fd(self.socket.fileno()), self._path if self.own else None, self._for_all)

    def look_after(self) -> None:
        """Check that the socket's file is still there, and log it if not. Never raises.

        If the daemon made the file, and it has vanished, it is made again, unless another file has taken its
        place. Connections go on.
        """
        if self._path is None or not (self.own or self._identity):
            return
        trouble = ""
        try:
            if identity(self._path) != self._identity:
                remedy = "and the socket is made again" if self.own else f"and {_RESTART}"
                trouble = f"another file has taken the socket's place: remove that, {remedy}"
        except (FileNotFoundError, NotADirectoryError):
            trouble = self._make_again() if self.own else f"the socket's file has vanished: {_RESTART}"
        except OSError:
            return  # nobody can tell whether it is there
        if trouble and trouble != self._trouble:
            logger.error("nobody can connect", extra={"socket": self._path, "error": trouble})
        self._trouble = trouble

    def _make_again(self) -> str:
        """Make the vanished file once more; returns why that fails, empty if it does not."""
        assert self._path
        if _has_waiting(self.socket):
            return self._trouble  # they would be lost with the old socket: the accept thread takes them first
        try:
            with _listen(self._path, for_all=self._for_all) as sock:
                _prepare(sock)
                self._identity = identity(self._path)
                # The accept thread goes on with the same fd.
                os.dup2(sock.fileno(), self.socket.fileno(), inheritable=False)
        except (ListenError, OSError) as error:
            return f"the socket's file has vanished, and cannot be made again: {error}"
        logger.warning("the socket's file had vanished: it was made again", extra={"socket": self._path})
        return ""

    def open_to(self, *, for_all: bool) -> None:
        """Set who may connect to a socket of the daemon's own: its group, or all users. Never raises."""
        if not self.own or self._path is None or for_all == self._for_all:
            return
        try:
            if identity(self._path) == self._identity:
                os.chmod(self._path, 0o777 & ~_SOCKET_UMASKS[for_all])
            self._for_all = for_all
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                self._for_all = for_all  # when it is made again
            fields = {"socket": self._path, "error": error.strerror}
            logger.warning("the socket's permissions cannot be changed", extra=fields)
            return
        if for_all:
            _look_at_directory(self._path)

    def remove(self) -> None:
        """Remove the socket's file, if the daemon made it and it is still there. Never raises.

        Only the first call does: later the inode may belong to another daemon's socket, which listens there.
        """
        path, self._path = self._path, None
        with contextlib.suppress(OSError):
            if self.own and path and identity(path) == self._identity:
                os.unlink(path)


def _path_of(sock: socket.socket) -> str | None:
    """Return the path of an inherited socket's file, if it has one and the path is absolute."""
    name = sock.getsockname()
    return name if isinstance(name, str) and name.startswith("/") else None


def _seen_at(path: str | None) -> Identity | None:
    """Return the identity of the file at a path; None if this process, unlike its manager, cannot see it."""
    with contextlib.suppress(OSError):
        return identity(path) if path else None
    return None


def _has_waiting(sock: socket.socket) -> bool:
    """Whether connections wait to be accepted."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _prepare(sock: socket.socket) -> None:
    refuse_rights(sock)
    sock.setblocking(False)  # accepting goes on until no more connections wait


def _look_at_directory(path: str) -> None:
    """Log it if the socket's directory keeps out users whom the settings let in. Raises `OSError`."""
    directory = os.path.dirname(path)
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    if not mode & stat.S_IXOTH:
        logger.warning(
            "[access] names others, but only its group can reach what is in the socket's directory",
            extra={"directory": directory, "mode": f"{mode:04o}"},
        )


def _listen(path: str, *, for_all: bool) -> socket.socket:
    """Return a socket that listens at `path`. Makes the directory if necessary. Raises `ListenError`.

    Changes the process's umask for a moment, which affects no other thread: they make files with stricter
    modes.
    """
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise ListenError(f"{path}: a path of {size} bytes, the limit is {MAX_SOCKET_PATH}")
    try:
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            with _umask(0o022):  # directories above get 0755
                os.makedirs(directory)
            os.chmod(directory, _DIRECTORY_MODES[for_all])
        if for_all:
            _look_at_directory(path)
        with locked(directory):
            remove_stale(path)
            return _bind(path, _SOCKET_UMASKS[for_all])
    except OSError as error:
        raise ListenError(f"{path}: cannot listen: {error.strerror}") from None


def _bind(path: str, umask: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _umask(umask):
            sock.bind(path)
        sock.listen(socket.SOMAXCONN)  # the most that the kernel allows, unless an operator has raised it
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
