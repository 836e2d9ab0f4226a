"""The state of the daemon: the result of `GetStatus` (docs/protocol.md, extensions).

Sizes are in bytes, times in seconds. Lists are bounded; the counts beside them include what the lists leave
out. Ids, and texts that a client or a VM chose, are cut to `LONGEST_TEXT` characters.
"""

import msgspec

#: Longest id or text, in characters, including the `…` at the end of one that was cut.
LONGEST_TEXT = 256
#: The most entries in each list of a `VmStatus`.
MOST_LISTED = 8
#: The most VMs in a `Status`.
MOST_VMS = 2_048
#: The most users in a `Status`.
MOST_USERS = 1_024
#: The most failed VMs in a `Status`.
MOST_ENDED = 32
#: Seconds that the daemon waits for its VMs, all of them together, before it answers.
PATIENCE = 0.5


class _Part(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The base: immutable, in camel case on the wire, and every member is always sent."""


class LastError(_Part, frozen=True):
    """The latest error, and how long ago it occurred."""

    text: str
    age: float


class WaitingCommand(_Part, frozen=True):
    """A command that a client waits for: the agent has not answered it, or not yet one before it."""

    name: str
    age: float


class WaitingStream(_Part, frozen=True):
    """Output that a client has not taken yet."""

    #: The first seq of the client's fd.
    stream: int
    #: The process that allocated the fd, and its user. It may have passed the fd to another process.
    pid: int
    uid: int
    #: Bytes that wait on disk, and bytes that wait in memory.
    spooled: int
    pending: int
    #: How long the client has taken nothing.
    idle: float
    #: Whether the daemon has stopped reading the VM because of this client.
    holds_vm: bool
    #: Why the spool does not take what is pending; empty if it does, or has not been asked to.
    reason: str


class Traffic(_Part, frozen=True):
    """Everything that has passed between a VM and its clients so far."""

    bytes_to_clients: int
    bytes_to_vm: int
    frames_to_clients: int
    #: Counted as the agent gets them: a client's long frame reaches it as several.
    frames_to_vm: int
    #: Frames from the VM that nobody owned.
    stray_frames: int
    #: How often the VM had to wait for a client that did not read, as the spool could not take the output.
    pauses: int


class Streams(_Part, frozen=True):
    """A VM's I/O channel and the fds of its clients, at one moment."""

    #: Open fds of `allocateIO`.
    sessions: int
    traffic: Traffic
    #: Whether the daemon has stopped reading the VM; `waiting` tells which clients it waits for.
    paused: bool
    #: Sessions whose output waits: those that hold the VM first, then those that have been idle longest. All
    #: of them are counted in `waiting_sessions`, and their bytes in `spooled` and `pending`.
    waiting: list[WaitingStream]
    waiting_sessions: int
    spooled: int
    pending: int
    #: Bytes of stdin that wait because the VM takes none, and for how long it has taken none; 0 if it does.
    stdin_held: int
    stdin_stalled: float
    #: Sessions whose stdin waits until the agent acknowledges what was sent to it.
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
    #: Connections that are attached to the VM.
    clients: int
    #: None if the VM's I/O pump has not started, or did not answer in time: `answers` tells which.
    streams: Streams | None
    #: False if the VM's I/O pump did not answer in time.
    answers: bool
    #: Commands that clients wait for, oldest first; `waiting_commands` counts all of them.
    commands: list[WaitingCommand]
    waiting_commands: int
    #: Commands that the agent has not answered, including those that no client waits for any longer.
    unanswered: int
    last_error: LastError | None


class UserStatus(_Part, frozen=True):
    """What one user has of everything that `[limits.user]` in the settings limits."""

    uid: int
    connections: int
    vms: int
    sessions: int
    #: Commands that wait for a VM's answer.
    commands: int
    #: Bytes that wait on disk for this user's clients.
    spooled: int


class EndedVm(_Part, frozen=True):
    """A VM that is gone because it was lost or never came up."""

    id: str
    error: LastError


class Replaced(_Part, frozen=True):
    """How often a new process of the daemon has taken over the VMs and clients of the one before."""

    #: Planned ones: restarts, and upgrades of the package.
    restarts: int = 0
    #: Unplanned ones: the previous process was killed, or failed.
    crashes: int = 0
    #: Why this process took over: `restart` or `crash`; empty if it is the first.
    last: str = ""


class Status(_Part, frozen=True):
    """The daemon and all its VMs."""

    version: str
    pid: int
    #: Of this process.
    uptime: float
    #: Path of the settings file; empty if there is none.
    settings_file: str
    log_level: str
    #: Connected clients.
    connections: int
    #: Users who have any of what is limited, ordered by uid, `MOST_USERS` at most.
    users: list[UserStatus]
    #: Bytes that wait on disk for all clients together.
    spooled: int
    #: Ordered by id, `MOST_VMS` at most; `vm_count` counts all of them.
    vms: list[VmStatus]
    vm_count: int
    #: VMs that failed, latest first, `MOST_ENDED` at most.
    ended: list[EndedVm]
    #: Time since the first process started whose VMs have been handed down to this one: no VM can have been
    #: registered for longer. 0 from an older daemon, which does not tell.
    known_for: float = 0.0
    replaced: Replaced = Replaced()
    #: How often bytes of streams were lost when a process was killed, and how many bytes at most.
    gaps: int = 0
    lost: int = 0


def count(number: int, thing: str) -> str:
    """Return a number of things in words: `1 VM`, `2 VMs`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def shorten(text: str) -> str:
    """Return `text`, cut to `LONGEST_TEXT` characters."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
