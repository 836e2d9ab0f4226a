"""The clients' connections as values, for another process to go on with.

A time is the number of seconds that are left.
"""

from msgspec import Struct

from cc_proxy.continuity.state import Record
from cc_proxy.linux.fds import Fd


class ConnectionState(Struct, frozen=True):
    """`Connection`."""

    fd: Fd
    number: int
    #: The index in `RegistryState.vms` of the VM that it is attached to.
    vm: int | None
    #: The text of the request that has no answer yet, if any; and what has come after it.
    unread: bytes
    text: bytes | None
    delay: float
    #: What is left to send of a response, and the fd that follows it.
    unsent: bytes
    passed: Fd | None
    #: The time for the unfinished message or response; None if there is none.
    left: float | None
    #: Bytes that count against `request_bytes`.
    counted: int


class ListenerState(Struct, frozen=True):
    """`Listener`: `path` is that of its file, if the daemon made it."""

    fd: Fd
    path: str | None
    for_all: bool


class ServerState(Struct, frozen=True):
    """`Server`."""

    listener: ListenerState
    connections: list[ConnectionState]
    next_number: int


class ConnectionRecord(Record, frozen=True, tag=4):
    """A connection that is kept."""

    fd: Fd
    number: int
