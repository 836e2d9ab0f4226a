"""What the daemon says of itself: the result of `GetStatus` (docs/protocol.md, extensions).

Sizes are bytes, times are seconds. Lists are bounded; the numbers beside them count what was left out too.
Ids and texts that somebody else chose are cut to `LONGEST_TEXT` characters.
"""

import msgspec

#: Characters of an id or a text, a `…` at its end included.
LONGEST_TEXT = 256
#: Entries of a list that belongs to one VM.
MOST_LISTED = 8
#: VMs that are listed.
MOST_VMS = 2_048
#: Users that are listed.
MOST_USERS = 1_024


class _Part(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Common shape: immutable, camel case on the wire, every member always there."""


class LastError(_Part, frozen=True):
    """What went wrong last, and how long ago."""

    text: str
    age: float


class WaitingCommand(_Part, frozen=True):
    """A command for the agent that a client waits for: it is being carried out, or others are in its way."""

    name: str
    age: float


class WaitingStream(_Part, frozen=True):
    """Output that a client has not taken yet."""

    #: The first stream of its fd.
    stream: int
    #: The process and the user that asked for it; the process may have passed it on.
    pid: int
    uid: int
    #: Bytes that wait on disk, and in memory.
    spooled: int
    pending: int
    #: Since when the client has taken nothing.
    idle: float
    #: Whether the VM is not read because of it.
    holds_vm: bool
    #: Why the spool has not taken what is pending; empty if it has, or has not been asked.
    reason: str


class Traffic(_Part, frozen=True):
    """What has passed between a VM and its clients so far."""

    bytes_to_clients: int
    bytes_to_vm: int
    frames_to_clients: int
    #: As the agent gets them: a long frame of a client's is several.
    frames_to_vm: int
    #: Frames from the VM that nobody owned.
    stray_frames: int
    #: How often the VM had to wait because the spool did not take what a client did not read.
    pauses: int


class Streams(_Part, frozen=True):
    """A VM's I/O channel and the fds of its clients, at one moment."""

    #: Fds of `allocateIO` that are open.
    sessions: int
    traffic: Traffic
    #: Whether the VM is not read now; `waiting` tells because of whom.
    paused: bool
    #: Sessions whose output waits, the longest first; how many there are; and what waits altogether.
    waiting: list[WaitingStream]
    waiting_sessions: int
    spooled: int
    pending: int
    #: Bytes of stdin the VM does not take, and since when it has taken none; 0 if it does.
    stdin_held: int
    stdin_stalled: float
    #: Sessions whose stdin waits until the agent has acknowledged what it was sent.
    stdin_unacknowledged: int


class VmStatus(_Part, frozen=True):
    """One VM."""

    id: str
    #: The user who said hello.
    uid: int
    #: `starting`, `up`, `leaving` (bye was said) or `lost` (what it sent is still delivered).
    state: str
    #: Since hello.
    age: float
    #: Connections that are attached to it.
    clients: int
    #: None while it has no I/O pump yet, or if that did not answer in time: `answers` tells which.
    streams: Streams | None
    #: False if its I/O pump was asked and did not answer in time.
    answers: bool
    #: Commands that clients wait for, the oldest first, and how many there are.
    commands: list[WaitingCommand]
    waiting_commands: int
    #: Commands that the agent has not answered, those included that nobody waits for any more.
    unanswered: int
    last_error: LastError | None


class UserStatus(_Part, frozen=True):
    """What one user has of what is limited (`[limits.user]` in the settings)."""

    uid: int
    connections: int
    vms: int
    sessions: int
    #: Commands that wait for their VMs' answers.
    commands: int
    #: Bytes that wait on disk.
    spooled: int


class EndedVm(_Part, frozen=True):
    """A VM that was lost, or never came up, and is gone."""

    id: str
    error: LastError


class Status(_Part, frozen=True):
    """The daemon and all its VMs."""

    version: str
    pid: int
    uptime: float
    #: Path of the settings file, empty if there is none.
    settings_file: str
    log_level: str
    #: Clients that are connected.
    connections: int
    #: Those who have anything, by uid, `MOST_USERS` at most.
    users: list[UserStatus]
    #: Bytes that wait on disk for all clients together.
    spooled: int
    #: Ordered by id, `MOST_VMS` at most; and how many there are.
    vms: list[VmStatus]
    vm_count: int
    #: Those of late, the latest first.
    ended: list[EndedVm]


def shorten(text: str) -> str:
    """Return `text`, cut to `LONGEST_TEXT` characters."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
