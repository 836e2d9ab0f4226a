"""The clients' connections as values, for another process to go on with.

Times are in seconds, and what is left of them.
"""

from msgspec import Struct

from cc_proxy.continuity.state import Record
from cc_proxy.linux.fds import Fd


class ConnectionState(Struct, frozen=True):
    """`Connection`."""

    fd: Fd
    number: int
    #: Where the VM that it is attached to stands among all of them.
    vm: int | None
    #: What has come of requests, behind the one whose `text` it is that has no answer yet.
    unread: bytes
    text: bytes | None
    delay: float
    #: What is left of a response, and the fd that goes out behind that.
    unsent: bytes
    passed: Fd | None
    #: Until the message that is unfinished, or the response, has to be through; None if there is none.
    left: float | None
    #: Bytes that it counts for while they are on their way.
    counted: int


class ListenerState(Struct, frozen=True):
    """`Listener`: `path` is where it stands, if it was made by the daemon."""

    fd: Fd
    path: str | None
    for_all: bool


class ServerState(Struct, frozen=True):
    """`Server`."""

    listener: ListenerState
    connections: list[ConnectionState]
    next_number: int


class ConnectionRecord(Record, frozen=True, tag=4):
    """A connection that has been there for a while."""

    fd: Fd
    number: int
