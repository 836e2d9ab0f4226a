"""The state of an agent's channels between two bytes, as values that another process goes on with."""

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
    """`Resync`: what tells the agent's frames from other bytes."""

    #: All streams have lower seqs.
    next_seq: int
    #: The seq of the marker that was sent as a probe.
    probe: int


class ParserState(Struct, frozen=True):
    """`ControlParser`: what has come of a message; `begun` is its code and the part of it that is kept."""

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
