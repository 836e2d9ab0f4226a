"""One loop for everything that happens while a process runs.

Before each wait, every party says which fd it wants to use, and for what. A party that asks for nothing is
paused, which makes back-pressure: while nobody reads stdout, no frames are read; while the proxy takes no
frames, stdin is not read.
"""

import select
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from cc_proxy.ctl.streams import ProcessStreams

#: An fd, and the poll(2) events to watch it for. With no events it is not watched.
Wanted = tuple[int, int]
NOTHING: Wanted = (-1, 0)

#: Bytes to read from the I/O fd at once.
_READ_SIZE = 64 * 1024
#: While this many bytes of output wait, nothing more is read.
_ENOUGH_OUTPUT = 64 * 1024


class Party(Protocol):
    """A participant of the loop."""

    def wants(self) -> Wanted:
        """Return what to wait for. The loop calls it before each wait."""

    def handle(self, events: int, /) -> None:
        """Use the fd without blocking. `events` are those of poll(2)."""


def loop(parties: Sequence[Party], done: Callable[[], bool]) -> None:
    """Let each party work whenever its fd is ready, until `done`. An exception from a party ends the loop."""
    while not done():
        poll = select.poll()
        waiting: dict[int, Party] = {}
        for party in parties:
            fd, events = party.wants()
            if events:
                poll.register(fd, events)
                waiting[fd] = party
        for fd, events in poll.poll():
            waiting[fd].handle(events)


class FrameSource(Protocol):
    """Where the frames for the I/O fd come from."""

    frames: bytes

    def close(self) -> None:
        """Give up: nobody takes the frames any more."""


class FrameSink(Protocol):
    """Where the output goes."""

    size: int

    def push(self, fd: int, data: bytes) -> None:
        """Take output for a standard fd."""


class IoFd:
    """The I/O fd of a process: sends the frames of `stdin`, and pushes what arrives to `output`."""

    def __init__(
        self, sock: socket.socket, streams: ProcessStreams, stdin: FrameSource, output: FrameSink
    ) -> None:
        self._sock = sock
        self._streams = streams
        self._stdin = stdin
        self._output = output
        #: Whether the proxy has closed its end, and everything has been read.
        self.at_eof = False

    def wants(self) -> Wanted:
        """Write while there is something to send; read until too much output waits."""
        sending = select.POLLOUT if self._stdin.frames else 0
        reading = select.POLLIN if self._may_read() else 0
        return self._sock.fileno(), sending | reading

    def handle(self, events: int) -> None:
        """Write and read. Raises `ProtocolError` if what arrives is not frames."""
        if self._stdin.frames:
            self.send()
        # poll(2) reports a hang-up as its own event, asked for or not.
        if events & ~select.POLLOUT and self._may_read():
            self._receive()

    def _may_read(self) -> bool:
        ended = self.at_eof or self._streams.status is not None
        return not ended and self._output.size < _ENOUGH_OUTPUT

    def send(self) -> None:
        """Send as much stdin as the proxy takes now."""
        try:
            sent = self._sock.send(self._stdin.frames, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except ConnectionError:
            # The process may have ended, and its last output can still be read.
            self._stdin.close()
            return
        self._stdin.frames = self._stdin.frames[sent:]

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        self.at_eof = not data
        for fd, output in self._streams.receive_data(data):
            self._output.push(fd, output)
