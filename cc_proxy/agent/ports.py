"""A serial port of the VM, seen from the guest: hosts come and go at its other end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from cc_proxy.agent.loop import HANG_UP, NOTHING_ELSE, READ, WRITE, Loop, Turn
from cc_proxy.linux.fds import Piece

_READ_SIZE = 64 * 1024


class PortUser(Protocol):
    """What a port calls. All of these methods may call the port."""

    def connected(self) -> None:
        """Called when a host has come, and everything that the last one sent has been taken."""

    def readable(self) -> None:
        """Called while there is something to `Port.receive`, if only the news that the host has gone."""

    def disconnected(self) -> None:
        """Called when the host has gone; what it sent before may still be `readable`."""


class Port(ABC):
    """Serves one host after the other.

    What is sent goes to the host that is there, or to the next. As with the buffers of a virtio queue, the
    rest of a message that one host has begun to read does not go to another.
    """

    def __init__(self, loop: Loop, turn: Turn) -> None:
        self._loop = loop
        self._turn = turn
        self._user: PortUser | None = None
        #: The fd to read from and write to the host; None while there is none.
        self._host: int | None = None
        self._events = NOTHING_ELSE
        self._reading = False
        self._rest = b""  # what the last host sent and nobody has taken yet
        self._waiting: list[Piece] = []
        self._until_drained: list[Callable[[], None]] = []
        #: Bytes that wait to be sent.
        self.waiting_size = 0

    @property
    def connected(self) -> bool:
        """Whether there is a host."""
        return self._host is not None

    @property
    def is_awaited(self) -> bool:
        """Whether anything waits until everything has been sent (`when_drained`)."""
        return bool(self._until_drained)

    def serve(self, user: PortUser) -> None:
        """Begin to serve hosts, on behalf of `user`. Nothing is read before `set_reading`."""
        self._user = user
        self._await_host()

    def set_reading(self, on: bool) -> None:
        """Set whether `user.readable` is called."""
        self._reading = on
        self._watch_host()
        if on and self._rest:
            self._loop.call_later(0, self._take_rest)

    def receive(self, size: int) -> bytes:
        """Return at most `size` bytes of what the host has sent; empty if there are none, or no host."""
        if self._rest:
            data, self._rest = self._rest[:size], self._rest[size:]
            return data
        if self._host is None:
            return b""
        try:
            data = self._read(self._host, size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._see_off()
        return data

    def send(self, *messages: bytes) -> None:
        """Send whole messages as far as possible now; the rest waits."""
        self._waiting += messages
        self.flush()

    def send_later(self, message: bytes) -> None:
        """Send a whole message, but not before this port's next turn."""
        self._waiting.append(message)
        self._settle()

    def flush(self) -> None:
        """Send what waits, as far as possible now."""
        if self._host is not None and self._waiting:
            try:
                self._waiting = list(self._write(self._host, self._waiting))
            except OSError:
                self._see_off()
        self._settle()

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once everything that waits has been sent or discarded; at once if nothing waits."""
        self._until_drained.append(callback)
        self._settle()

    def discard(self) -> None:
        """Forget what waits to be sent."""
        self._waiting = []
        self._settle()

    @abstractmethod
    def close(self) -> None:
        """Hang up, and serve no more hosts. May be called more than once."""

    # What each kind of port implements ---------------------------------------------------------------

    @abstractmethod
    def _await_host(self) -> None:
        """Call `_take_host` when a host has come."""

    @abstractmethod
    def _read(self, host: int, size: int) -> bytes:
        """Return what the host has sent; empty if it has gone. Raises `OSError`."""

    @abstractmethod
    def _write(self, host: int, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Send the host as much as it takes now; returns the rest. Raises `OSError` if it has gone."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Close the connection to a host that has gone. Everything it sent has been read."""

    # -------------------------------------------------------------------------------------------------

    def _take_host(self, fd: int) -> None:
        self._host = fd
        self._events = NOTHING_ELSE
        self._loop.watch(fd, NOTHING_ELSE, self._ready, self._turn)
        self._watch_host()
        if self._user is not None:
            self._user.connected()
        self.flush()

    def _watch_host(self) -> None:
        if self._host is None:
            return
        events = (READ if self._reading else NOTHING_ELSE) | (WRITE if self._waiting else NOTHING_ELSE)
        if events != self._events:
            self._events = events
            self._loop.watch(self._host, events, self._ready, self._turn)

    def _ready(self, events: int) -> None:
        if events & HANG_UP:
            self._see_off()
            return
        # What the host has sent is handled first, even if there is no room for an answer.
        if events & READ and self._user is not None:
            self._user.readable()
        if events & WRITE:
            self.flush()

    def _see_off(self) -> None:
        """Handle a host that has gone. What it sent still counts, so read it before another host comes."""
        host = self._host
        if host is None:
            return
        with suppress(OSError):
            while data := self._read(host, _READ_SIZE):
                self._rest += data
        self._host = None
        self._loop.forget(host)
        self._hang_up()
        if self._waiting and _is_rest(self._waiting[0]):
            del self._waiting[0]
        if self._user is not None:
            self._user.disconnected()
        self._settle()
        # Later, because the caller may be in the middle of reading or writing.
        self._loop.call_later(0, self._take_rest)

    def _take_rest(self) -> None:
        """Have what the last host sent taken; then the next one may come."""
        while self._rest and self._reading and self._user is not None:
            self._user.readable()
        if not self._rest and self._host is None:
            self._await_host()

    def _settle(self) -> None:
        """React to a change of what waits."""
        self.waiting_size = sum(map(len, self._waiting))
        self._watch_host()
        if self._until_drained and not self._waiting:
            callbacks, self._until_drained = self._until_drained, []
            for callback in callbacks:
                callback()


def _is_rest(piece: Piece) -> bool:
    """Whether the beginning of a message has been sent: `cut` leaves a view of its rest."""
    return isinstance(piece, memoryview) and len(piece) < memoryview(piece.obj).nbytes
