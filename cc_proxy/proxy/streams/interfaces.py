"""What the streams of a VM need from outside: whose they are, and what is watched beside them."""

import socket
from collections.abc import Callable
from typing import NamedTuple, Protocol

from cc_proxy.continuity.cells import NO_CELL, Cell

#: Sends the agent this many pings, one after the other, and calls back with whether all were answered. It
#: does not wait. It may call back from any thread, at once, later or never.
Acknowledge = Callable[[int, Callable[[bool], None]], None]


class Place(NamedTuple):
    """What a session occupies; `give_back` is called when it is closed."""

    give_back: Callable[[], None]
    cell: Cell = NO_CELL


class Pacing(NamedTuple):
    """How to find out that the agent has handled the stdin it was sent."""

    #: Seconds to wait for a marker to come back.
    echo_timeout: float
    #: Asks the agent instead if it has not come by then.
    acknowledge: Acknowledge


class Lost(Exception):
    """The VM is lost; the text is the cause."""


class Owner(Protocol):
    """The VM that a channel belongs to. Called by the thread that drives the channel, holding no lock."""

    container_id: str

    def lose(self, cause: str) -> None:
        """The VM is lost. May be called more than once."""

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
