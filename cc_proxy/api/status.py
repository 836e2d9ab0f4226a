"""The state of the daemon: the result of `GetStatus` (docs/protocol.md, extensions).

Sizes are in bytes, times in seconds. Lists are bounded; the numbers beside them count what the lists leave
out too. Ids and texts that somebody else chose are cut to `LONGEST_TEXT` characters.
"""

import msgspec

#: Longest id or text, in characters, with the `…` at its end.
LONGEST_TEXT = 256
#: The most entries in a list of one VM's.
MOST_LISTED = 8
#: The most VMs that are listed.
MOST_VMS = 2_048
#: The most users that are listed.
MOST_USERS = 1_024
#: The most VMs that failed.
MOST_ENDED = 32
#: Seconds that the daemon waits for all its VMs together before it answers.
PATIENCE = 0.5


class _Part(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The base: immutable, camel case on the wire, every member always present."""


class LastError(_Part, frozen=True):
    """The latest error, and how long ago it was."""

    text: str
    age: float


class WaitingCommand(_Part, frozen=True):
    """A command that a client waits for: the agent is at it, or at others before it."""

    name: str
    age: float


class WaitingStream(_Part, frozen=True):
    """Output that a client has not taken yet."""

    #: The first stream of its fd.
    stream: int
    #: The process that asked for its fd, and its user. That process may have passed it on.
    pid: int
    uid: int
    #: Bytes that wait on disk, and bytes that wait in memory.
    spooled: int
    pending: int
    #: How long the client has taken nothing.
    idle: float
    #: Whether the VM is not read because of it.
    holds_vm: bool
    #: Why the spool does not take what is pending; empty if it does, or was not asked to.
    reason: str


class Traffic(_Part, frozen=True):
    """Everything that has passed between a VM and its clients so far."""

    bytes_to_clients: int
    bytes_to_vm: int
    frames_to_clients: int
    #: As the agent gets them: a long frame of a client's is several.
    frames_to_vm: int
    #: Frames from the VM that nobody owned.
    stray_frames: int
    #: How often the VM had to wait because the spool took no more of what a client did not read.
    pauses: int


class Streams(_Part, frozen=True):
    """A VM's I/O channel and the fds of its clients, at one moment."""

    #: Fds of `allocateIO` that are open.
    sessions: int
    traffic: Traffic
    #: Whether the VM is not read at present; `waiting` tells who is the reason.
    paused: bool
    #: Sessions whose output waits, the longest first; how many they are; and the bytes of all of them.
    waiting: list[WaitingStream]
    waiting_sessions: int
    spooled: int
    pending: int
    #: Bytes of stdin that the VM does not take, and how long it has taken none; 0 if it takes them.
    stdin_held: int
    stdin_stalled: float
    #: Sessions whose stdin waits for the agent to acknowledge what it was sent.
    stdin_unacknowledged: int


class VmStatus(_Part, frozen=True):
    """One VM."""

    id: str
    #: The user who said hello.
    uid: int
    #: `starting`; `up`; `leaving`, after bye; `lost`, while its last output is being delivered; or `gone`,
    #: when only its id is left.
    state: str
    #: Time since hello.
    age: float
    #: Connections that are attached to it.
    clients: int
    #: None before there is an I/O pump, and if the pump did not answer in time: `answers` tells which.
    streams: Streams | None
    #: False if its I/O pump did not answer in time.
    answers: bool
    #: Commands that clients wait for, the oldest first; and how many they are.
    commands: list[WaitingCommand]
    waiting_commands: int
    #: Commands that the agent has not answered, including those that nobody waits for any more.
    unanswered: int
    last_error: LastError | None


class UserStatus(_Part, frozen=True):
    """How much one user has of everything that is limited (`[limits.user]` in the settings)."""

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


class Replaced(_Part, frozen=True):
    """How often one process of the daemon has gone on where another ended, its VMs and clients staying."""

    #: Those that were planned: restarts, and upgrades of the package.
    restarts: int = 0
    #: Those in which the process before was killed, or failed.
    crashes: int = 0
    #: Why this process took over: `restart` or `crash`; empty if it is the first one.
    last: str = ""


class Status(_Part, frozen=True):
    """The daemon and all its VMs."""

    version: str
    pid: int
    #: Of this process.
    uptime: float
    #: Path of the settings file, empty if there is none.
    settings_file: str
    log_level: str
    #: Clients that are connected.
    connections: int
    #: Users who have anything, by uid, `MOST_USERS` at most.
    users: list[UserStatus]
    #: Bytes that wait on disk for all clients together.
    spooled: int
    #: Ordered by id, `MOST_VMS` at most; and how many VMs there are.
    vms: list[VmStatus]
    vm_count: int
    #: VMs that failed, the latest first, `MOST_ENDED` at most.
    ended: list[EndedVm]
    #: Since the first of the processes that have followed each other: no VM is known for longer. 0 from a
    #: daemon that does not say.
    known_for: float = 0.0
    replaced: Replaced = Replaced()
    #: How often bytes of streams were lost as a process was killed, and how many those were at most.
    gaps: int = 0
    lost: int = 0


def count(number: int, thing: str) -> str:
    """Return a number of things in words: `1 VM`, `2 VMs`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def shorten(text: str) -> str:
    """Return `text`, cut to `LONGEST_TEXT` characters."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
