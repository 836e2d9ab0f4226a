"""Keeps, outside of this process, what has to outlive it however it ends.

Each part has a record, which says what it is made of, fds included, and a cell, which says where it stands.
The table holds both, and the box holds the fds. If this process is killed, the next one makes the parts again
from them.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cc_proxy.continuity.box import Box
from cc_proxy.continuity.cells import NO_CELL, Cell
from cc_proxy.continuity.format import DaemonRecord, encode
from cc_proxy.continuity.state import Record
from cc_proxy.continuity.table import Table
from cc_proxy.linux.fds import Identity, identity_of
from cc_proxy.log.levels import logger

#: The daemon's own fds are kept under this number. Those of slots begin at 1.
_DAEMON = 0
#: The box is packed when more parts than this have been released, plus an eighth of those that are kept.
_FEW = 64


class Slot:
    """Where one part is kept. Its owner changes the cell; any thread may release it."""

    __slots__ = ("_release", "cell", "number")

    def __init__(
        self,
        number: int = 0,
        cell: Cell = NO_CELL,
        release: Callable[[int], None] | None = None,
    ) -> None:
        #: Unique in this process: other parts' records name this one by it. 0 if the part is not kept.
        self.number = number
        #: Its words; `NO_CELL` if the part is not kept.
        self.cell = cell
        self._release = release or _ignore

    def release(self) -> None:
        """Stop keeping the part. Its cell must not be written to any more. May be called more than once."""
        self.cell = NO_CELL  # before another part gets the slot
        release, self._release = self._release, _ignore
        release(self.number)


def _ignore(_number: int) -> None:
    """Nothing is kept."""


class Keeper(Protocol):
    """Keeps parts outside of the process. Any thread may call."""

    def keep(self, record: Record, memory: int = -1, words: Sequence[int] = ()) -> Slot:
        """Keep a part, and close the fd `memory`, if it has one, when it is released.

        `words` are the first of its cell; the others are 0. Never raises: a part that cannot be kept ends
        with the process, which is logged.
        """

    def new_memory(self, size: int) -> int:
        """Return the fd of memory that may be part of a record; -1 if nothing is kept. Raises `OSError`."""


class _Nothing:
    """Keeps nothing, because no process would find it."""

    def keep(self, record: Record, memory: int = -1, words: Sequence[int] = ()) -> Slot:  # noqa: ARG002
        return Slot()

    def new_memory(self, size: int) -> int:  # noqa: ARG002
        return -1


NOTHING: Keeper = _Nothing()


class TableKeeper:
    """See `Keeper`. The next process finds what is kept here only after `take_over`.

    If this process is killed before that, the next one finds what the previous one left.
    """

    def __init__(self, table: Table, box: Box) -> None:
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._table = table
        table.begin()
        self._box = box
        self._counts = False  # whether `take_over` was called
        self._released = 0  # parts whose fds may still be in the box
        self._is_told = False  # whether the log says that the last part could not be kept
        self._daemon = b""
        # By slot number: the fds of each part, with their identities then (by now an fd may be closed, or
        # stand for something else); and the memory that is closed with the part.
        self._fds: dict[int, dict[int, Identity]] = {}
        self._memory: dict[int, int] = {}

    # Any thread -------------------------------------------------------------------------------------------

    def keep(self, record: Record, memory: int = -1, words: Sequence[int] = ()) -> Slot:
        """Keep a part, and close the fd `memory`, if it has one, when it is released. Never raises."""
        try:
            data, fds = encode(record)
            with self._lock:
                if self._counts:
                    self._put(fds)
                number, cell = self._table.add(data, words)
                self._fds[number] = fds
                if memory >= 0:
                    self._memory[number] = memory
                self._is_told = False
                return Slot(number, cell, self._release)
        except (OSError, ValueError) as error:
            if memory >= 0:
                os.close(memory)
            with self._lock:
                is_told, self._is_told = self._is_told, True
            if not is_told:
                fields = {"part": type(record).__name__, "error": str(error)}
                logger.warning("this, and perhaps more, will not outlive a crash of cc-proxy", extra=fields)
            return Slot()

    def new_memory(self, size: int) -> int:
        """Return the fd of memory that may be part of a record. Raises `OSError`."""
        fd = os.memfd_create("cc-proxy-streams")
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _release(self, number: int) -> None:
        with self._lock:
            if self._fds.pop(number, None) is not None:
                self._table.remove(number)
                self._released += 1
            if number in self._memory:
                os.close(self._memory.pop(number))

    # Main thread ------------------------------------------------------------------------------------------

    def take_over(self, daemon: DaemonRecord) -> None:
        """Have the next process find what this one keeps, instead of what the previous one left.

        Raises `OSError` or `ValueError` if that fails. Then the next process finds nothing.
        """
        data, fds = encode(daemon)
        with self._lock:
            self._fds[_DAEMON], self._daemon = fds, data
            try:  # most of it is still there, from the previous process
                self._box.put({fd: each for fd, each in self._open().items() if not self._box.has(each)})
                self._table.take_over(data)
            except (OSError, ValueError):
                self._table.end()
                raise
            self._counts = True
            self._pack()

    def set_daemon(self, daemon: DaemonRecord, *, is_well: bool) -> None:
        """Keep what is now known of the daemon itself; `is_well` if it has survived what it took over.

        Raises `OSError` or `ValueError`.
        """
        data, fds = encode(daemon)
        with self._lock:
            if is_well:
                self._table.be_well()
            if data == self._daemon:
                return
            if fds != self._fds[_DAEMON]:
                self._put(fds)
            self._table.set_daemon(data)
            self._fds[_DAEMON], self._daemon = fds, data

    def hand_over(self, state: bytes, fds: Mapping[int, Identity]) -> None:
        """Leave a state and its fds, which count instead of the slots from now on.

        Raises `OSError`, and then nothing has changed. Otherwise nothing may be kept here after that.
        """
        with self._lock:
            self._box.put_state(state, fds)
            self._table.hand_over()

    def end(self) -> None:
        """Leave nothing to the next process."""
        with self._lock:
            self._table.end()
            with contextlib.suppress(OSError):
                self._box.drop(self._box.messages)
        self.close()

    def close(self) -> None:
        """Keep nothing more; what is kept stays."""
        with self._lock:
            self._counts = False
            self._fds.clear()
            while self._memory:
                os.close(self._memory.popitem()[1])

    # Requires _lock ---------------------------------------------------------------------------------------

    def _put(self, fds: Mapping[int, Identity]) -> None:
        """Put fds into the box. Raises `OSError`."""
        # Fds of released parts count against LimitNOFILE= while they are in the box, and once that limit is
        # reached, it cannot be packed any more.
        if self._box.is_crowded or self._released > _FEW + len(self._fds) // 8:
            self._pack()
        self._box.put(fds)

    def _pack(self) -> None:
        """Have the box hold only what is kept, in few messages, as far as possible."""
        with contextlib.suppress(OSError):  # one of them was closed just now, or too many fds are in flight
            self._released = 0
            self._box.pack(self._open())

    def _open(self) -> dict[int, Identity]:
        """Return the fds that are kept and still stand for the same things."""
        known = (pair for some in self._fds.values() for pair in some.items())
        return {fd: identity for fd, identity in known if _stands_for(fd) == identity}


def _stands_for(fd: int) -> Identity | None:
    with contextlib.suppress(OSError):
        return identity_of(fd)
    return None
