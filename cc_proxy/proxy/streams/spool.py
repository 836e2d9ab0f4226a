"""Output that waits for a client, in files without names, so that it takes none of the daemon's memory."""

import contextlib
import mmap
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cc_proxy.continuity.memory import BUFFER_SIZE
from cc_proxy.continuity.state.streams import SpoolFile
from cc_proxy.linux.fds import IOV_MAX, Fd, Piece, cut
from cc_proxy.settings import LiveSettings, SpoolSettings

#: A full spool has this many files. The disk gets a file back only when all of it has been read. More files
#: would hold less disk in vain, but take more fds.
_FILES = 32
#: File systems allocate whole blocks, of a page at most.
_BLOCK = mmap.PAGESIZE

#: Threads that the disk may keep waiting, by ident. Each adds and removes itself: atomic under the GIL.
_at_disk: set[int] = set()


def is_at_disk(thread: int | None) -> bool:
    """Whether a thread is in a call that may have to wait for the disk. Any thread."""
    return thread in _at_disk


@contextlib.contextmanager
def _waiting_for_disk() -> Iterator[None]:
    thread = threading.get_ident()
    _at_disk.add(thread)
    try:
        yield
    finally:
        _at_disk.discard(thread)


class SpoolSpace:
    """How much of the disk all spools may hold, and where. Any thread may call.

    Whole blocks count, from the first write to them until their file is closed.
    """

    def __init__(self, live: LiveSettings) -> None:
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._used = 0
        self._used_by: Counter[int] = Counter()  # uids
        self._live = live

    @property
    def settings(self) -> SpoolSettings:
        """The settings of spools now."""
        return self._live.current.spool

    @property
    def used(self) -> int:
        """Bytes of the disk that all spools hold together."""
        return self._used

    def used_by(self, uid: int) -> int:
        """Bytes of the disk that the spools of one user hold."""
        return self._used_by[uid]

    def take(self, wanted: int, uid: int) -> int:
        """Reserve up to `wanted` bytes for a user, in whole blocks; returns how many there were."""
        limits = self.settings
        with self._lock:
            left = min(limits.total_limit - self._used, limits.user_limit - self._used_by[uid])
            taken = max(0, min(wanted, left)) // _BLOCK * _BLOCK
            self._count(taken, uid)
        return taken

    def count(self, size: int, uid: int) -> None:
        """Count bytes that a user holds already, whatever the limits say."""
        with self._lock:
            self._count(size, uid)

    def give_back(self, size: int, uid: int) -> None:
        """Release `size` bytes that a user took."""
        with self._lock:
            self._count(-size, uid)

    def _count(self, size: int, uid: int) -> None:
        """Count, and forget a user who holds nothing. Requires _lock."""
        self._used += size
        self._used_by[uid] += size
        if not self._used_by[uid]:
            del self._used_by[uid]


class Spool:
    """What waits for one client, in order. Pump thread.

    A file is made when output has to wait, and closed once it has been read, so a client that is always slow
    takes little more room than its waiting output. Files have no names and vanish with the daemon.

    No place in a file is written twice, and no part of a file is given back: `sendfile` leaves the file's
    pages in the socket, and the client reads what they hold by then. (ext4 and xfs zero pages where a hole is
    punched.)
    """

    def __init__(self, space: SpoolSpace, uid: int) -> None:
        self._space = space
        self._uid = uid
        self._files: deque[_File] = deque()
        #: Bytes that wait.
        self.size = 0
        #: Bytes of the disk that its files hold. A sum, because each batch asks, and there may be many files.
        self.held = 0

    def hand_over(self) -> list[SpoolFile]:
        """Give up what waits, for `restore`."""
        files = [SpoolFile(Fd(file.fd), file.size, file.start, file.stop) for file in self._files]
        self._files.clear()
        self.held = 0
        return files

    def restore(self, files: Sequence[SpoolFile]) -> None:
        """Take over what waited in another spool."""
        self._files.extend(_File(file.fd.number, file.size, file.start, file.stop) for file in files)
        self.size = sum(file.stop - file.start for file in files)
        self.held = sum(file.held for file in self._files)
        self._space.count(self.held, self._uid)

    def append(self, pieces: Sequence[Piece]) -> int:
        """Store as much of `pieces` as there is room for; returns how many bytes that was.

        Raises `OSError` if the file system takes nothing at all: no space, no fd, no directory.
        """
        size, held = self.size, self.held
        wanted = sum(map(len, pieces))
        room = self._space.settings.session_limit - held
        taken = self._space.take(min(_in_blocks(wanted), room), self._uid)
        if not taken:
            return 0
        try:
            if taken < wanted:
                pieces = cut(pieces, 0, taken)
            with _waiting_for_disk():
                for first in range(0, len(pieces), IOV_MAX):
                    self._write(pieces[first : first + IOV_MAX])
        except OSError:
            if self.size == size:
                raise
        finally:
            self._space.give_back(taken - (self.held - held), self._uid)
        return self.size - size

    def drain_to(self, fd: int) -> int:
        """Move some of what waits to a non-blocking socket; returns how many bytes.

        Raises `BlockingIOError` if it takes nothing now, or another `OSError` if the client is gone.
        """
        file = self._files[0]
        with _waiting_for_disk():
            # No more than what is read at once, so that one client's backlog does not hold up the others.
            moved = os.sendfile(fd, file.fd, file.start, min(file.stop - file.start, BUFFER_SIZE))
        file.start += moved
        self.size -= moved
        if file.start == file.stop:
            self._close(self._files.popleft())
        return moved

    def close(self) -> None:
        """Throw away what waits."""
        self.size = 0
        while self._files:
            self._close(self._files.popleft())

    def _close(self, file: "_File") -> None:
        with _waiting_for_disk():
            os.close(file.fd)
        self.held -= file.held
        self._space.give_back(file.held, self._uid)

    def _write(self, pieces: Sequence[Piece]) -> None:
        """Store all of at most `IOV_MAX` pieces. Raises `OSError`; what was stored before that stays."""
        while pieces:
            if not self._files or self._files[-1].stop == self._files[-1].size:
                self._files.append(self._new_file())
            file = self._files[-1]
            try:
                written = os.pwritev(file.fd, cut(pieces, 0, file.size - file.stop), file.stop)
            except OSError:
                if not file.stop:
                    os.close(self._files.pop().fd)
                raise
            held = file.held
            file.stop += written
            self.held += file.held - held
            self.size += written
            pieces = cut(pieces, written)

    def _new_file(self) -> "_File":
        """Make a file. It has its size from the beginning: xfs holds twice as much for one that grows."""
        settings = self._space.settings
        size = max(_BLOCK, _in_blocks(settings.session_limit // _FILES))
        fd = _open_unnamed(settings.directory)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        return _File(fd, size, 0, 0)


@dataclass(slots=True)
class _File:
    """One piece of a spool: what waits in it stands between `start` and `stop`."""

    fd: int
    size: int
    start: int
    stop: int

    @property
    def held(self) -> int:
        """Bytes of the disk that the file holds, however much of it has been read."""
        return _in_blocks(self.stop)


def _in_blocks(size: int) -> int:
    """Round a size up to whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


def check_directory(directory: str) -> None:
    """Raise `OSError` if no file can be made in `directory`."""
    os.close(_open_unnamed(directory))


def _open_unnamed(directory: str) -> int:
    """Open a file that has no name in `directory`, readable by nobody else."""
    with contextlib.suppress(OSError):
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    # Some file systems lack O_TMPFILE.
    fd, name = tempfile.mkstemp(prefix="cc-proxy-", dir=directory)
    os.unlink(name)
    return fd
