"""The control channel's socket: one read or write at a time."""

import contextlib
import os
import select
import socket
from collections.abc import Callable

from cc_proxy.api.transport import limit_receive
from cc_proxy.continuity.cells import NO_CELL
from cc_proxy.hyperstart.control import KEPT_PAYLOAD, ControlChannel, ControlMessage
from cc_proxy.linux.fds import is_for_now, unread
from cc_proxy.proxy.streams.interfaces import Lost

#: Bytes of a read. Most answers are shorter; of a long message, more is read at once.
_READ_SIZE = 512
_HUNG_UP = "the VM hung up its control channel"


class ControlLost(Lost):
    """The control channel is lost; the text is the cause."""


class ControlSocket:
    """Owns the socket. One thread at a time, except for `hang_up`, `check` and `fileno`.

    The socket has an epoll instance of its own, which the pump waits for beside much else. The instance is
    readable when the agent has said something or hung up, unless another thread waits for that (`watch`).
    """

    def __init__(self, sock: socket.socket, on_event: Callable[[ControlMessage], None]) -> None:
        """`on_event` is called with each message of the agent that answers no command."""
        self.sock = sock
        #: What is to be sent, and what has been received.
        self.channel = ControlChannel()
        self._on_event = on_event
        self._lost: ControlLost | None = None
        self._end = _HUNG_UP  # the cause to give at end of file; set once at most
        self._receive_ticks = 0
        self._cell = NO_CELL
        self._epoll = select.epoll()
        self._epoll.register(sock, 0)
        self._watched_for = 0

    # Any thread -------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The fd of the epoll instance."""
        return self._epoll.fileno()

    def hang_up(self, cause: str = "") -> None:
        """Hang up, with this cause if one is given. The socket stays open until `close`."""
        self._end = cause or self._end
        with contextlib.suppress(OSError):  # the VM has hung up, or it is closed
            self.sock.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise `ControlLost` if the VM has hung up, or this side has."""
        poll = select.poll()
        poll.register(self.sock, 0)
        if poll.poll(0):
            raise ControlLost(self._end)

    # One thread at a time ---------------------------------------------------------------------------------

    def keep(self, cell: memoryview) -> None:
        """Store in two words how much has come of an unfinished message, and how much is left to send."""
        self._cell = cell
        cell[0], cell[1] = self.channel.position, len(self.channel.outgoing)

    def watch(self, watched: bool) -> None:
        """Have the epoll instance say, or not say, when there is something to do."""
        # The agent may not have taken all of a posted command. The watching thread sends the rest.
        writing = select.EPOLLOUT if self.channel.outgoing else 0
        events = select.EPOLLIN | writing if watched else 0
        if events != self._watched_for and not self.is_closed:
            self._watched_for = events
            self._epoll.modify(self.sock, events)

    def exchange(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the agent and read once; returns whether it said something.

        Raises `ControlLost`, as all of the following do.
        """
        if self.channel.outgoing:
            ready = select.poll()
            ready.register(self.sock)
            return self.exchange_when_ready(ready, timeout)
        # One call that both waits and reads, because most of a command's time is spent here.
        self._limit_receive(timeout)
        return self._has_read(0)

    def exchange_when_ready(self, ready: select.poll, timeout: float) -> bool:
        """Do the same with a poll object that has the socket, and whatever else is to end the waiting."""
        if self.channel.outgoing:
            self.write()
        ready.modify(self.sock, select.POLLIN | (select.POLLOUT if self.channel.outgoing else 0))
        return bool(ready.poll(int(timeout * 1000) + 1)) and self._has_read(socket.MSG_DONTWAIT)

    def look(self) -> bool | None:
        """Read once, without waiting; returns None if nothing is there."""
        return self._has_read(socket.MSG_DONTWAIT) or None

    def read_what_is_there(self) -> None:
        """Read what has arrived by now, and no more: an answer may be behind events, which may never end."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(0, unread(self.sock) + 1, _READ_SIZE):
                self._read(socket.MSG_DONTWAIT)

    def write(self) -> None:
        """Send as much as the VM takes now."""
        outgoing = self.channel.outgoing
        try:
            del outgoing[: self.sock.send(outgoing, socket.MSG_DONTWAIT)]
            self._cell[1] = len(outgoing)
        except OSError as error:
            if is_for_now(error):
                return
            raise ControlLost(f"control channel: {os.strerror(error.errno or 0)}") from None

    def lose(self, lost: ControlLost) -> None:
        """Hang up, and have every later read raise `lost`."""
        self._lost = lost
        self.hang_up()

    @property
    def is_closed(self) -> bool:
        """Whether the socket was closed or given up."""
        return self._epoll.closed

    def close(self) -> None:
        """Close everything, if that is not done yet."""
        if not self.is_closed:
            self._epoll.close()
            self.sock.close()

    def give_up(self) -> socket.socket:
        """Close everything but the socket, which is the caller's from now on."""
        self._epoll.close()
        return self.sock

    def _limit_receive(self, timeout: float) -> None:
        """Set the timeout of recv(2), rounded up to hundredths of a second, so that it rarely changes."""
        ticks = int(timeout * 100) + 1
        if ticks != self._receive_ticks:
            self._receive_ticks = ticks
            limit_receive(self.sock, ticks / 100)

    def _has_read(self, flags: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._read(flags)
            return True
        return False

    def _read(self, flags: int) -> None:
        size = max(_READ_SIZE, min(self.channel.missing, KEPT_PAYLOAD))
        try:
            data = self.sock.recv(size, flags)
        except OSError as error:
            if is_for_now(error):
                raise BlockingIOError from None
            raise ControlLost(f"control channel: {os.strerror(error.errno or 0)}") from None
        if self._lost:
            raise self._lost
        if not data:
            raise ControlLost(self._end)
        events = self.channel.receive_data(data)
        self._cell[0] = self.channel.position
        for event in events:
            self._on_event(event)
        if self.channel.error:
            raise ControlLost(f"control channel: {self.channel.error}")
