"""What the words of live cells mean (`interfaces.Cell`): where a channel and its sessions stand, for whoever
goes on with them once this process has been killed.
"""

from typing import Final, NamedTuple

#: Of every cell: `Reading`, of a VM's output or of a client's stdin.
READING: Final = 0

#: Of a VM's cell: the last turn whose stdin the VM has; whether what the VM has may end in the middle of a
#: frame; whether its agent is lossless; and whether it is not known where its frames begin.
SENT_TURN: Final = 1
VM_TORN: Final = 2
LOSSLESS: Final = 3
SEEKING: Final = 4

#: Of a session's cell: the turn in which it was read last, and where the splitter stands behind it
#: (`StdinSplitter.word`); the generation of the last marker; flags; whether what its client has ends in the
#: middle of a frame; and the bytes in its spool.
SPLIT: Final = 1
MARKER: Final = 2
FLAGS: Final = 3
TORN: Final = 4
SPOOLED: Final = 5

#: Flags of a session: its process may have been started; it has been; its client sends no more; takes none.
EXPECTED: Final = 1
STARTED: Final = 2
ENDED: Final = 4
GONE: Final = 8

#: Set while something is being read.
BUSY: Final = 1 << 63
#: Where the numbers of a `Reading` are, but for the first.
SIZE_AT: Final = 20
WHERE_AT: Final = 40
_MASK: Final = (1 << 20) - 1
#: Turns of stdin are counted modulo this.
TURNS: Final = 1 << 22


class Reading(NamedTuple):
    """What was read last, or is being read."""

    #: Whether it is still being read.
    busy: bool
    #: Where in the buffer the first frame begins that has not been passed on; of stdin, where it was read to.
    start: int
    #: How much was read. While it is busy: how much will be; 0 if that is not known.
    size: int
    #: Of output, where in the buffer it was read to; of stdin, in which turn it was.
    where: int

    @classmethod
    def from_word(cls, word: int) -> "Reading":
        """Return what a word says."""
        busy, word = bool(word & BUSY), word & ~BUSY
        return cls(busy, word & _MASK, word >> SIZE_AT & _MASK, word >> WHERE_AT)
