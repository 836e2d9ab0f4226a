"""What the words of cells mean: where each part stands, for the process that goes on after a kill."""

from enum import Enum, IntEnum, auto
from typing import Final, NamedTuple

from cc_proxy.linux import receipt

#: Words of 64 bits, in native order, which the next process can read if this one is killed. A store takes
#: 35 ns, and whenever the kill comes, a word has either the old value or the new one.
Cell = memoryview
#: Bytes of every cell: 32 words.
CELL_SIZE = 8 * 32
#: How many words, at the beginning of a VM's cell and of a session's, are about its streams.
VM_WORDS = 16
SESSION_WORDS = 8
#: Words that no process reads. All parts that are not kept store into these.
NO_CELL: Cell = memoryview(bytearray(CELL_SIZE)).cast("Q")

# Streams --------------------------------------------------------------------------------------------------

#: In the cells of VMs and of sessions: `Reading`, of the VM's output or of the client's stdin.
READING: Final = 0

#: In a VM's cell: the last turn whose stdin the VM has; whether what the VM has may end in the middle of a
#: frame; whether its agent is lossless; whether it is unknown where its frames begin; and when it is to end
#: (CLOCK_MONOTONIC, in nanoseconds), 0 if that is not known.
SENT_TURN: Final = 1
VM_TORN: Final = 2
LOSSLESS: Final = 3
SEEKING: Final = 4
FINISH_AT: Final = 5

#: In a session's cell: the turn in which it was last read, and where the splitter stood after that
#: (`StdinSplitter.word`); the generation of the last marker; flags; whether what its client has may end in
#: the middle of a frame; and the bytes in its spool.
SPLIT: Final = 1
MARKER: Final = 2
FLAGS: Final = 3
TORN: Final = 4
SPOOLED: Final = 5

#: Flags of a session: its process may have been started; it has been; its client sends no more; its client
#: takes no more.
EXPECTED: Final = 1
STARTED: Final = 2
ENDED: Final = 4
GONE: Final = 8

#: Set in a `Reading` while something is being read.
BUSY: Final = 1 << 63
#: The lowest bits of `size` and `where` in a `Reading`; `start` begins at bit 0.
SIZE_AT: Final = 20
WHERE_AT: Final = 40
_MASK: Final = (1 << 20) - 1
#: Turns of stdin are counted modulo this.
TURNS: Final = 1 << 22


class Reading(NamedTuple):
    """What was read last, or is being read."""

    #: Whether it is still being read.
    busy: bool
    #: For output, where in the buffer the first frame begins that has not been passed on. For stdin, where in
    #: the buffer the bytes were read to.
    start: int
    #: How much was read. While `busy`: how much will be, 0 if that is not known.
    size: int
    #: For output, where in the buffer the bytes were read to. For stdin, the turn.
    where: int

    @classmethod
    def from_word(cls, word: int) -> "Reading":
        """Return what a word says."""
        busy, word = bool(word & BUSY), word & ~BUSY
        return cls(busy, word & _MASK, word >> SIZE_AT & _MASK, word >> WHERE_AT)


# VMs ------------------------------------------------------------------------------------------------------

#: Words of a VM's cell, after those of its streams: its state, by value, 0 until it is up; its next seq; and,
#: for its control channel, what has come of an unfinished message, and how many bytes are left to send.
AT_STATE, AT_NEXT_SEQ, AT_RECEIVED, AT_SENT = range(VM_WORDS, VM_WORDS + 4)
#: The word of a session's cell, after those of its streams, that says how far its process has come. The pump
#: may learn that only after the client whose command started the process.
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

#: Words of a connection's cell: its phase; the slot number of the VM that it is attached to; and, in several
#: words, the receipt of its response (`Receipt`).
AT_PHASE, AT_VM = 0, 1
AT_RECEIPT: Final = slice(2, 2 + receipt.WORDS)


class Phase(IntEnum):
    """What is known of a connection at a moment."""

    #: Every request that has been read is answered.
    SILENT = 0
    #: One whole request has been read, and nothing after it; nothing of its response has been sent.
    ASKED = 1
    #: Anything else: nobody can tell what the client has yet to get.
    BETWEEN = 2
    #: Something has come and is being read: either it is still in the socket, or one request has been read.
    READING = 3
    #: As ASKED, but the response is being sent in one call: the receipt tells whether it was.
    SENDING = 4
    #: The same, followed by a byte with an fd: the receipt is that of the later of the two sends.
    PASSING = 5
