"""The streams of one VM as values, for another process to go on with.

A time is the number of seconds that are left, or an age in seconds.
"""

from msgspec import Struct

from cc_proxy.api.status import Traffic
from cc_proxy.continuity.state import Record
from cc_proxy.hyperstart.state import ResyncState, SplitterState, WindowState
from cc_proxy.linux.fds import Fd


class SpoolFile(Struct, frozen=True):
    """A file of a spool: what waits in it stands between `start` and `stop`."""

    fd: Fd
    size: int
    start: int
    stop: int


class SessionState(Struct, frozen=True):
    """`Session`, and whether a command to start its process was sent (`expected`, from `Routes`)."""

    fd: Fd
    first_seq: int
    seqs: int
    uid: int
    pid: int
    expected: bool
    started: bool
    stdin_open: bool
    output_gone: bool
    splitter: SplitterState
    window: WindowState | None
    pending: bytes
    stuck: str
    spool: list[SpoolFile]
    patience: float
    #: The time until `pending` moves to the spool; None if it is not going to.
    patient: float | None
    idle: float


class PacerState(Struct, frozen=True):
    """`Pacer`, without the sessions."""

    frames: int
    markers: int
    handled: int
    echoes_in_a_row: int
    lossless: bool


class StreamsState(Struct, frozen=True):
    """What a channel copies."""

    #: What has been read of an unfinished frame of the VM, and what the VM has yet to take.
    unfinished: bytes
    to_vm: bytes
    sessions: list[SessionState]
    pacer: PacerState
    traffic: Traffic
    #: Set if the beginning of a frame has yet to be found; nothing is unfinished then.
    resync: ResyncState | None = None


class ChannelState(Struct, frozen=True):
    """`Channel`."""

    #: None if it is closed while clients have yet to read what had come.
    io: Fd | None
    finish_in: float | None
    finish_cause: str
    streams: StreamsState


class SessionRecord(Record, frozen=True, tag=3):
    """A session, while it is open. `vm` is the number of its VM's slot."""

    fd: Fd
    vm: int
    first_seq: int
    seqs: int
    uid: int
    pid: int
