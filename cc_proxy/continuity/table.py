"""The table: what a process keeps for the next one, in memory that outlives it.

Whenever the process is killed, the table makes sense. A slot counts once its generation is stored, which is
done last. In the same way one word of the header says which generation counts, and which copy of the daemon's
own record. Such a word is in native order, so that it is stored in one step.
"""

import itertools
import mmap
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cc_proxy.continuity.cells import CELL_SIZE

#: In native order, so that it is stored in one step.
_WORD = struct.Struct("@Q")
#: The last byte is the version of all that follows.
_MAGIC = b"ccproxy\x01"
_MAGIC_SIZE = len(_MAGIC)
#: Where the header's words are: what counts, how many slots have ever been used, and how many processes have
#: begun with what is here since the last one that survived it.
_AT_STATE, _AT_SLOTS, _AT_TRIES = 8, 16, 24

#: Where the two copies of the daemon's own record are. A new one replaces the copy that does not count.
_DAEMON_SIZE = 256 * 1024
_COPIES = {1: mmap.PAGESIZE, 2: mmap.PAGESIZE + _DAEMON_SIZE}

_SLOTS_AT = mmap.PAGESIZE + 2 * _DAEMON_SIZE
_SLOT_SIZE = 1024
#: Room for twice the connections, sessions and VMs, up or gone, that the settings allow by default: a process
#: that takes over writes its own slots beside those that it has found.
MOST_SLOTS = 131_072
#: How a slot begins: its generation, the length of its record, and its number, unique in its generation.
_SLOT = struct.Struct("@IIQ")
_GENERATION = struct.Struct("@I")
_CELL_AT = _SLOT_SIZE - CELL_SIZE

#: Bytes of the table; only what is in use takes memory.
SIZE = _SLOTS_AT + MOST_SLOTS * _SLOT_SIZE
MOST_IN_RECORD = _CELL_AT - _SLOT.size
_NO_WORDS = bytes(CELL_SIZE)


class Unreadable(Exception):
    """What the previous process has left cannot be read; the text says why."""


class Entry(NamedTuple):
    """A slot of the previous process."""

    number: int
    record: bytes
    cell: memoryview


class _State(NamedTuple):
    """What counts, in one word."""

    generation: int
    #: Which copy of the daemon's record counts; 0 if nothing does.
    copy: int
    #: Whether everything has been handed over, so that the slots do not count.
    handed_over: bool

    @classmethod
    def from_word(cls, word: int) -> "_State":
        return cls(word >> 3, word >> 1 & 3, bool(word & 1))

    @property
    def word(self) -> int:
        return self.generation << 3 | self.copy << 1 | self.handed_over


class Table:
    """A table in memory of `SIZE` bytes, empty if all are zero. One thread at a time, except for cells."""

    def __init__(self, memory: mmap.mmap) -> None:
        """Raises `Unreadable` if there is anything else in the memory."""
        self.memory = memory
        self._view = memoryview(memory)
        found = memory[:_MAGIC_SIZE]
        if found not in (_MAGIC, bytes(_MAGIC_SIZE)):
            raise Unreadable(f"the table is not of this version, but begins with {found!r}")
        self._state = _State.from_word(self._word(_AT_STATE))
        # The generation of what this process writes, which counts from `take_over` on.
        self._generation = self._state.generation + 1
        self._numbers = itertools.count(1)
        # Offsets of the slots that this process has taken, by number; and of free ones.
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    # What the previous process has left -------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether nothing was left."""
        return not self._state.copy

    @property
    def is_handed_over(self) -> bool:
        """Whether the slots do not count, because the process handed over everything."""
        return self._state.handed_over

    @property
    def daemon(self) -> bytes:
        """The daemon's own record."""
        at = _COPIES[self._state.copy]
        size = self._word(at)
        return self.memory[at + _WORD.size : at + _WORD.size + size]

    def entries(self) -> Iterator[Entry]:
        """Yield the slots that count."""
        for at in filter(self._counts, self._all()):
            _, size, number = _SLOT.unpack_from(self.memory, at)
            begin = at + _SLOT.size
            yield Entry(number, self.memory[begin : begin + size], self._cell(at))

    def note_try(self) -> int:
        """Count this process, which is about to go on; returns how many before it have not survived that."""
        tries = self._word(_AT_TRIES)
        _WORD.pack_into(self.memory, _AT_TRIES, tries + 1)
        return tries

    # What this process leaves -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare to write. Call it once, before anything that follows."""
        self._free = [at for at in self._all() if not self._counts(at)]
        for at in self._free:  # they may be of a process that was killed before it took over
            _GENERATION.pack_into(self.memory, at, 0)

    def add(self, record: bytes, words: Sequence[int] = ()) -> tuple[int, memoryview]:
        """Keep a record; returns the number of its slot, and its cell, which begins with these words.

        Raises `ValueError` if there is no room.
        """
        if len(record) > MOST_IN_RECORD:
            raise ValueError(f"a record of {len(record)} bytes, the most is {MOST_IN_RECORD}")
        at = self._free.pop() if self._free else self._begin_slot()
        number, cell = next(self._numbers), self._cell(at)
        begin = at + _SLOT.size
        self._view[begin : begin + len(record)] = record
        self._view[at + _CELL_AT : at + _SLOT_SIZE] = _NO_WORDS
        for word, value in enumerate(words):
            cell[word] = value
        _SLOT.pack_into(self.memory, at, 0, len(record), number)
        _GENERATION.pack_into(self.memory, at, self._generation)
        self._slots[number] = at
        return number, cell

    def _begin_slot(self) -> int:
        used = self._word(_AT_SLOTS)
        if used == MOST_SLOTS:
            raise ValueError(f"more than {MOST_SLOTS} parts")
        _WORD.pack_into(self.memory, _AT_SLOTS, used + 1)
        return _SLOTS_AT + used * _SLOT_SIZE

    def _cell(self, at: int) -> memoryview:
        return self._view[at + _CELL_AT : at + _SLOT_SIZE].cast("Q")

    def remove(self, number: int) -> None:
        """Forget a record of this process. Its cell must not be used any more."""
        self._forget(self._slots.pop(number))

    def _forget(self, at: int) -> None:
        _GENERATION.pack_into(self.memory, at, 0)
        self._free.append(at)

    def set_daemon(self, record: bytes) -> None:
        """Replace the daemon's own record. Raises `ValueError` if there is no room."""
        self._count(self._state._replace(copy=self._write_daemon(record)))

    def take_over(self, daemon: bytes) -> None:
        """Have what this process has written count, in place of what it has found.

        Raises `ValueError` if there is no room for the daemon's own record.
        """
        self._view[:_MAGIC_SIZE] = _MAGIC
        copy = self._write_daemon(daemon)
        stale = list(filter(self._counts, self._all()))
        self._count(_State(self._generation, copy, handed_over=False))
        for at in stale:
            self._forget(at)

    def hand_over(self) -> None:
        """Have the slots count no more, because everything has been handed over."""
        self.be_well()
        self._count(self._state._replace(handed_over=True))

    def be_well(self) -> None:
        """Note that this process has survived what it took over."""
        _WORD.pack_into(self.memory, _AT_TRIES, 0)

    def end(self) -> None:
        """Leave nothing to the next process."""
        self._count(_State(self._generation, 0, handed_over=False))

    def _all(self) -> range:
        """Return the offsets of all slots that have ever been used."""
        return range(_SLOTS_AT, _SLOTS_AT + self._word(_AT_SLOTS) * _SLOT_SIZE, _SLOT_SIZE)

    def _counts(self, at: int) -> bool:
        [generation] = _GENERATION.unpack_from(self.memory, at)
        return bool(self._state.copy and generation == self._state.generation)

    def _write_daemon(self, record: bytes) -> int:
        """Write the daemon's own record over the copy that does not count; returns which."""
        if len(record) > _DAEMON_SIZE - _WORD.size:
            raise ValueError(f"the daemon's own record has {len(record)} bytes")
        copy = 1 if self._state.copy == 2 else 2  # noqa: PLR2004 - the other one
        at = _COPIES[copy]
        _WORD.pack_into(self.memory, at, len(record))
        self._view[at + _WORD.size : at + _WORD.size + len(record)] = record
        return copy

    def _count(self, state: _State) -> None:
        _WORD.pack_into(self.memory, _AT_STATE, state.word)
        self._state = state

    def _word(self, at: int) -> int:
        [word] = _WORD.unpack_from(self.memory, at)
        return int(word)
