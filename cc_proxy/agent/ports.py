"""A serial port of the VM, seen from the guest, with the hypervisor's socket on the other side of it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Protocol

from cc_proxy.agent.loop import HANG_UP, NOTHING_ELSE, READ, WRITE, Loop, Turn
from cc_proxy.agent.socketfile import SocketFile
from cc_proxy.linux.fds import Piece, close_stream, send_pieces

log = logging.getLogger(__name__)

#: Seconds until a connection is tried to be taken again that the process has no fd left for.
_ACCEPT_AGAIN = 0.1


class PortUser(Protocol):
    """What a port calls. Any of it may call the port back."""

    def connected(self) -> None:
        """Called when a host has come."""

    def readable(self) -> None:
        """Called while there is something to `Port.receive`, if only that the host has gone."""

    def disconnected(self) -> None:
        """Called when the host has gone; what it sent before may still be `readable`."""


class Port:
    """Takes one host after the other. Those that connect meanwhile wait, and nothing answers them.

    What is sent goes to the host that is there, or to the next: like the buffers of a virtio queue, a
    message that was begun is not finished for another host.
    """

    def __init__(self, loop: Loop, path: str, turn: Turn) -> None:
        self._loop = loop
        self._turn = turn
        self._file = SocketFile(path)
        self._user: PortUser | None = None
        self._peer: socket.socket | None = None
        self._listens = False
        self._events = NOTHING_ELSE
        self._reading = False
        self._waiting: list[Piece] = []
        self._until_drained: list[Callable[[], None]] = []
        #: Bytes that wait to be sent.
        self.waiting_size = 0

    @property
    def connected(self) -> bool:
        """Whether there is a host that takes what is sent."""
        return self._listens

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for what is to be sent to be through (`when_drained`)."""
        return bool(self._until_drained)

    def serve(self, user: PortUser) -> None:
        """Begin to take hosts, on behalf of `user`. Nothing is read before `set_reading`."""
        self._user = user
        self._watch_listener()

    def set_reading(self, on: bool) -> None:
        """Set whether `user.readable` is called. What a host sends and leaves while it is not, is lost."""
        self._reading = on
        self._watch_peer()

    def receive(self, size: int) -> bytes:
        """Return what the host has sent, `size` bytes at most; nothing if there is nothing, or no host."""
        if self._peer is None:
            return b""
        try:
            data = self._peer.recv(size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._see_off()
        return data

    def send(self, *messages: bytes) -> None:
        """Send whole messages, as far as they go now; the rest waits."""
        self._waiting += messages
        self.flush()

    def send_later(self, message: bytes) -> None:
        """Send a whole message, but not before this port's next turn."""
        self._waiting.append(message)
        self._settle()

    def flush(self) -> None:
        """Send what waits, as far as it goes now."""
        if self._peer is not None and self._listens and self._waiting:
            try:
                self._waiting = list(send_pieces(self._peer, self._waiting))
            except OSError:
                self._lose()
        self._settle()

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once, when everything that waits has been sent or discarded: at once if nothing does."""
        self._until_drained.append(callback)
        self._settle()

    def discard(self) -> None:
        """Forget what waits to be sent."""
        self._waiting = []
        self._settle()

    def close(self) -> None:
        """Hang up, and remove the socket. No matter if that has been done."""
        self._loop.forget(self._file.sock.fileno())
        self._hang_up()
        self._file.close()

    def _settle(self) -> None:
        """See what follows from a change of what waits."""
        self.waiting_size = sum(map(len, self._waiting))
        self._watch_peer()
        if self._until_drained and not self._waiting:
            callbacks, self._until_drained = self._until_drained, []
            for callback in callbacks:
                callback()

    def _watch_listener(self) -> None:
        self._loop.watch(self._file.sock.fileno(), READ, self._accept, self._turn)

    def _accept(self, _events: int) -> None:
        self._loop.forget(self._file.sock.fileno())
        try:
            self._peer, _ = self._file.sock.accept()
        except OSError as error:
            log.info("cannot take a connection", extra={"socket": self._file.path, "error": str(error)})
            self._loop.call_later(_ACCEPT_AGAIN, self._watch_listener)
            return
        self._peer.setblocking(False)
        self._listens = True
        self._events = NOTHING_ELSE
        self._loop.watch(self._peer.fileno(), NOTHING_ELSE, self._ready, self._turn)
        self._watch_peer()
        if self._user is not None:
            self._user.connected()
        self.flush()

    def _watch_peer(self) -> None:
        if self._peer is None:
            return
        writing = self._listens and bool(self._waiting)
        events = (READ if self._reading else NOTHING_ELSE) | (WRITE if writing else NOTHING_ELSE)
        if events != self._events:
            self._events = events
            self._loop.watch(self._peer.fileno(), events, self._ready, self._turn)

    def _ready(self, events: int) -> None:
        # What the host has sent is handled first, whether there is room for an answer or not.
        if events & ~WRITE:
            if self._reading and self._user is not None:
                self._user.readable()
            elif events & HANG_UP:
                self._see_off()
        if events & WRITE:
            self.flush()

    def _lose(self) -> None:
        """The host has gone. What it sent before it did is as good as ever, so it is not hung up on yet."""
        self._listens = False
        if self._waiting and _is_rest(self._waiting[0]):
            del self._waiting[0]
        if self._user is not None:
            self._user.disconnected()

    def _see_off(self) -> None:
        """The host has gone, and everything it sent has been taken: the next one may come."""
        if self._listens:
            self._lose()
        self._hang_up()
        self._watch_listener()
        self._settle()

    def _hang_up(self) -> None:
        peer, self._peer = self._peer, None
        self._listens = False
        if peer is not None:
            self._loop.forget(peer.fileno())
            close_stream(peer)


def _is_rest(piece: Piece) -> bool:
    """Whether the beginning of a message is gone: what `send_pieces` leaves of one is a view of it."""
    return isinstance(piece, memoryview) and len(piece) < memoryview(piece.obj).nbytes
