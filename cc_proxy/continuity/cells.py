"""What the words of cells mean: where each part stands, for whoever goes on once this one has been killed."""

from enum import Enum, IntEnum, auto
from typing import Final, NamedTuple

from cc_proxy.linux import receipt

#: Words of 64 bits, in native order, which another process can read once this one has been killed. Storing
#: into one takes 35 ns, and then it has either the old value or the new one.
Cell = memoryview
#: Bytes of every cell: 32 words.
CELL_SIZE = 8 * 32
#: The first of a VM's cell, and of a session's, are those of its streams.
VM_WORDS = 16
SESSION_WORDS = 8
#: Words that nobody reads: what is not kept has these, all of it together.
NO_CELL: Cell = memoryview(bytearray(CELL_SIZE)).cast("Q")

# Streams --------------------------------------------------------------------------------------------------

#: Of every cell: `Reading`, of a VM's output or of a client's stdin.
READING: Final = 0

#: Of a VM's cell: the last turn whose stdin the VM has; whether what the VM has may end in the middle of a
#: frame; whether its agent is lossless; whether it is not known where its frames begin; and when it is to end
#: (CLOCK_MONOTONIC, in nanoseconds), 0 if that is not known.
SENT_TURN: Final = 1
VM_TORN: Final = 2
LOSSLESS: Final = 3
SEEKING: Final = 4
FINISH_AT: Final = 5

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


# VMs ------------------------------------------------------------------------------------------------------

#: Words of a VM's cell, behind those of its streams: its state, by value, 0 until it is up; its next seq; and
#: what has come, and been sent, of unfinished messages on its control channel.
AT_STATE, AT_NEXT_SEQ, AT_RECEIVED, AT_SENT = range(VM_WORDS, VM_WORDS + 4)
#: The word of a session's cell, behind those of its streams, that says how far its process has come. The pump
#: may hear of that only after the client whose command started it.
AT_PROCESS = SESSION_WORDS
PROCESS_COMMANDED, PROCESS_STARTED = 1, 2


class State(Enum):
    """Where a VM is in its life."""

    STARTING = auto()  # hello has begun
    UP = auto()
    LEAVING = auto()  # bye was said: its clients may stay until the linger is over
    LOST = auto()  # what it has sent is still delivered
    GONE = auto()


# Connections ----------------------------------------------------------------------------------------------

#: Words of a connection's cell: its phase; the number by which the VM is kept that it is attached to; and, in
#: several words, whether its response has been sent (`Receipt`).
AT_PHASE, AT_VM = 0, 1
AT_RECEIPT: Final = slice(2, 2 + receipt.WORDS)


class Phase(IntEnum):
    """What is known of a connection at a moment."""

    #: Every request that has been read is answered.
    SILENT = 0
    #: One request has been read whole, and nothing behind it; nothing of its response has been sent.
    ASKED = 1
    #: Anything else: nobody can say what the client has yet to get.
    BETWEEN = 2
    #: Something has come and is being read: it is either in the socket still, or one request has been read.
    READING = 3
    #: As ASKED, and then its response is sent, all at once: the receipt tells whether it was.
    SENDING = 4
    #: The same, and behind that a byte with an fd: the receipt is that of the last of the two sends.
    PASSING = 5
