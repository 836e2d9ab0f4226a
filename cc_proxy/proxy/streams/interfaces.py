"""What the streams of a VM need from outside: whose they are, and what is watched beside them."""

import socket
from collections.abc import Callable
from mmap import MAP_SHARED, mmap
from typing import NamedTuple, Protocol

from cc_proxy.linux.memory import new_buffer

#: Words of 64 bits, which another process can read once this one has been killed. Storing into one takes
#: 35 ns, and then it has either the old value or the new one. `cells` has what the words mean.
Cell = memoryview
VM_WORDS = 16
SESSION_WORDS = 8
#: For what nobody is to read. One for all threads.
NO_CELL: Cell = memoryview(bytearray(8 * VM_WORDS)).cast("Q")

#: Bytes of each of a channel's two buffers.
BUFFER_SIZE = 256 * 1024

#: Sends the agent this many pings, one after the other, and calls back with whether all were answered. It
#: does not wait. It may call back from any thread, at once, later or never.
Acknowledge = Callable[[int, Callable[[bool], None]], None]


class Memory(NamedTuple):
    """What a channel works in: the buffers for what it reads, and its cell."""

    output: mmap
    stdin: mmap
    cell: Cell


def private_memory() -> Memory:
    """Return memory that goes with this process. Raises `OSError`."""
    return Memory(new_buffer(BUFFER_SIZE), new_buffer(BUFFER_SIZE), NO_CELL)


def shared_memory(fd: int, cell: Cell) -> Memory:
    """Return memory that stays for as long as anybody has `fd`, a memfd of twice `BUFFER_SIZE`.

    The fd stays the caller's, who may close it. Raises `OSError`.
    """
    output, stdin = (mmap(fd, BUFFER_SIZE, MAP_SHARED, offset=offset) for offset in (0, BUFFER_SIZE))
    return Memory(output, stdin, cell)


class Place(NamedTuple):
    """What a session takes up: `give_back` is called as it is closed."""

    give_back: Callable[[], None]
    cell: Cell = NO_CELL


class Pacing(NamedTuple):
    """How it is found out that the agent has handled the stdin it was sent."""

    #: Seconds that a marker is waited for.
    echo_timeout: float
    #: What is done if it has not come by then.
    acknowledge: Acknowledge


class Lost(Exception):
    """The VM is of no use any more; the text is the cause."""


class Owner(Protocol):
    """Whose channel it is; called by the thread that drives the channel, with nothing locked."""

    container_id: str

    def lose(self, cause: str) -> None:
        """The VM is lost. May be called again."""

    def ended(self) -> None:
        """Everything is closed, and the pump's thread is about to end."""


class Beside(Protocol):
    """What is watched beside the streams: the control channel's events, and the console."""

    def fileno(self) -> int:
        """The fd that becomes readable when `read` has something to do."""

    def read(self) -> bool:
        """Take what has come, without waiting; returns whether more may come. Raises `Lost`."""

    def close(self) -> None:
        """Give back the fd. The control channel's may be called more than once."""


class Sockets(NamedTuple):
    """The ends of a VM's channels: its I/O channel, and what is watched beside it."""

    io: socket.socket
    control: Beside
    console: Beside | None
