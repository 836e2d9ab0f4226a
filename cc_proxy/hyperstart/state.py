"""What is known of an agent's channels between two bytes, as values that another process goes on with."""

from msgspec import Struct


class SplitterState(Struct, frozen=True):
    """`StdinSplitter`."""

    header: bytes
    missing: int
    payload_bytes: int
    frames: int
    at_eof: bool


class WindowState(Struct, frozen=True):
    """`StdinWindow`."""

    size: int
    unacknowledged: int
    generation: int
    asked: int


class ResyncState(Struct, frozen=True):
    """`Resync`: what tells frames of the agent's from anything else."""

    #: Streams have lower seqs.
    next_seq: int
    #: The seq of the marker that was sent to find out.
    probe: int


class ParserState(Struct, frozen=True):
    """`ControlParser`: what has come of an unfinished message; `begun` is its code and what is kept of it."""

    buffer: bytes
    begun: tuple[int, bytes] | None
    skip: int


class QuizState(Struct, frozen=True):
    """`Quiz`."""

    codes: list[int]
    got: list[bytes | None]


class ControlChannelState(Struct, frozen=True):
    """`ControlChannel`, without its commands."""

    parser: ParserState
    outgoing: bytes
    quiz: QuizState | None
    ready: bool
    is_up: bool
