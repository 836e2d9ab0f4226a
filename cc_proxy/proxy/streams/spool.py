"""Output that waits for a client, outside the daemon's memory: in files without names."""

import contextlib
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from cc_proxy.linux.fds import IOV_MAX, Piece, cut
from cc_proxy.settings import LiveSettings, SpoolSettings

#: The most `sendfile` is asked to move at once, so that one client's backlog does not hold up the others.
_DRAIN_AT_ONCE = 256 * 1024
#: Once a file is this long, the next is begun.
_FILE_SIZE = 8 * 1024 * 1024


class SpoolSpace:
    """How much may wait in total, and where. Any thread may call."""

    def __init__(self, live: LiveSettings) -> None:
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._used = 0
        self._used_by: Counter[int] = Counter()  # uids
        self._live = live

    @property
    def settings(self) -> SpoolSettings:
        """What the settings say of it now."""
        return self._live.current.spool

    @property
    def used(self) -> int:
        """Bytes that wait in all spools together."""
        return self._used

    def used_by(self, uid: int) -> int:
        """Bytes that wait in all spools of one user."""
        return self._used_by[uid]

    def take(self, wanted: int, uid: int) -> int:
        """Reserve up to `wanted` bytes for a user; returns how many there were."""
        limits = self.settings
        with self._lock:
            left = min(limits.total_limit - self._used, limits.user_limit - self._used_by[uid])
            taken = max(0, min(wanted, left))
            self._count(taken, uid)
        return taken

    def give_back(self, size: int, uid: int) -> None:
        """Return `size` bytes that were taken for a user."""
        with self._lock:
            self._count(-size, uid)

    def _count(self, size: int, uid: int) -> None:
        """Users of whom nothing waits leave nothing. Requires _lock."""
        self._used += size
        self._used_by[uid] += size
        if not self._used_by[uid]:
            del self._used_by[uid]


class Spool:
    """What waits for one client, in order. Pump thread.

    Files are made as something has to wait and go as soon as it is through, so that a client which stays slow
    for ever takes no more room than what waits for it. They have no names and vanish with the daemon.
    A file is never written to where it was written before: `sendfile` leaves its pages in the socket, and
    what the client reads is what they hold by then.
    """

    def __init__(self, space: SpoolSpace, uid: int) -> None:
        self._space = space
        self._uid = uid
        self._files: deque[_File] = deque()
        #: Bytes that wait.
        self.size = 0

    def append(self, pieces: Sequence[Piece]) -> int:
        """Store as much of `pieces` as there is room for; returns how many bytes that was.

        Raises `OSError` if the file system takes nothing at all: no space, no fd, no directory.
        """
        room = self._space.settings.session_limit - self.size
        wanted = self._space.take(min(sum(map(len, pieces)), room), self._uid)
        done = 0
        try:
            while done < wanted:
                done += self._write(cut(pieces, done, wanted))
        except OSError:
            if not done:
                raise
        finally:
            self._space.give_back(wanted - done, self._uid)
        return done

    def drain_to(self, fd: int) -> int:
        """Move some of what waits to a non-blocking socket; returns how many bytes.

        Raises `BlockingIOError` if it takes nothing now, or another `OSError` if the client is gone.
        """
        file = self._files[0]
        moved = os.sendfile(fd, file.fd, file.start, min(file.stop - file.start, _DRAIN_AT_ONCE))
        file.start += moved
        self.size -= moved
        self._space.give_back(moved, self._uid)
        if file.start == file.stop:
            os.close(self._files.popleft().fd)
        return moved

    def close(self) -> None:
        """Throw away what waits."""
        self._space.give_back(self.size, self._uid)
        self.size = 0
        while self._files:
            os.close(self._files.popleft().fd)

    def _write(self, pieces: list[Piece]) -> int:
        if not self._files or self._files[-1].stop >= _FILE_SIZE:
            self._files.append(_File(_open_unnamed(self._space.settings.directory)))
        file = self._files[-1]
        try:
            written = os.pwritev(file.fd, pieces[:IOV_MAX], file.stop)
        except OSError:
            if file.start == file.stop:
                os.close(self._files.pop().fd)
            raise
        file.stop += written
        self.size += written
        return written


@dataclass(slots=True)
class _File:
    """One piece of a spool: what waits in it stands between `start` and `stop`."""

    fd: int
    start: int = 0
    stop: int = 0


def check_directory(directory: str) -> None:
    """Find out whether files can be made in `directory`. Raises `OSError` if not."""
    os.close(_open_unnamed(directory))


def _open_unnamed(directory: str) -> int:
    """Open a file that has no name in `directory`, readable by nobody else."""
    with contextlib.suppress(OSError):
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    # Some file systems know no O_TMPFILE.
    fd, name = tempfile.mkstemp(prefix="cc-proxy-", dir=directory)
    os.unlink(name)
    return fd
