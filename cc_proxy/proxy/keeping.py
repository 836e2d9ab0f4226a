"""What has to outlive this process, however it ends, and is kept outside of it as it changes.

Each part says what it is made of (a record, with fds), and where it stands (its cell). If the process is
killed, the next one makes the parts again from that.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

#: Words of a cell: 64 bits each, in native order. One that is stored is never found half stored.
CELL_WORDS = 32
#: In bytes.
CELL_SIZE = 8 * CELL_WORDS

#: Words that nobody reads: what is not kept has these, all of it together.
NOWHERE = memoryview(bytearray(CELL_SIZE)).cast("Q")


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a part is made of: facts that do not change, and its fds (`Fd`). Members are added at the end."""


class Slot:
    """Where one part is kept. Its owner changes the cell; any thread may release it."""

    __slots__ = ("_release", "cell", "number")

    def __init__(
        self,
        number: int = 0,
        cell: memoryview = NOWHERE,
        release: Callable[[int], None] | None = None,
    ) -> None:
        #: Others' records name it by this, and no other slot of this process has it; 0 if it is not kept.
        self.number = number
        #: Its words; `NOWHERE` if it is not kept.
        self.cell = cell
        self._release = release or _ignore

    def release(self) -> None:
        """The part is over, and nobody writes into the cell any more. No matter if it was released before."""
        self.cell = NOWHERE  # before another part has the slot
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
    """Keeps nothing: nobody would find it."""

    def keep(self, record: Record, memory: int = -1, words: Sequence[int] = ()) -> Slot:  # noqa: ARG002
        return Slot()

    def new_memory(self, size: int) -> int:  # noqa: ARG002
        return -1


NOTHING: Keeper = _Nothing()
