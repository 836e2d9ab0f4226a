"""One loop for everything that goes on while a process runs.

Each party says before every wait which fd it would like to use and for what, so pausing one is nothing but
its not asking: a stdout that is not read stops the reading of frames, and frames that are not taken stop
the reading of stdin.
"""

import select
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from cc_proxy.ctl.streams import ProcessStreams

#: An fd, and the poll(2) events it is to be watched for; no events, no watching.
Wanted = tuple[int, int]
NOTHING: Wanted = (-1, 0)

#: Read from the I/O fd at once.
_READ_SIZE = 64 * 1024
#: While as many bytes of output wait, nothing more is read.
_ENOUGH_OUTPUT = 64 * 1024


class Party(Protocol):
    """One who takes part in the loop."""

    def wants(self) -> Wanted:
        """Return what to wait for; asked before each wait."""

    def handle(self, events: int, /) -> None:
        """Use the fd, for which these poll(2) events came, without blocking."""


def loop(parties: Sequence[Party], done: Callable[[], bool]) -> None:
    """Let the parties do what they can whenever they can, until `done`. What they raise ends it too."""
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
        """Nobody takes them any more."""


class FrameSink(Protocol):
    """Where the output goes."""

    size: int

    def push(self, fd: int, data: bytes) -> None:
        """Take output for a standard fd."""


class IoFd:
    """The I/O fd of a process: what arrives is put into `output`, what `stdin` has is sent."""

    def __init__(
        self, sock: socket.socket, streams: ProcessStreams, stdin: FrameSource, output: FrameSink
    ) -> None:
        self._sock = sock
        self._streams = streams
        self._stdin = stdin
        self._output = output
        #: Whether the proxy has closed it.
        self.at_eof = False

    def wants(self) -> Wanted:
        """Send while there is something to be sent, read while output is not piling up."""
        sending = select.POLLOUT if self._stdin.frames else 0
        reading = select.POLLIN if self._may_read() else 0
        return self._sock.fileno(), sending | reading

    def handle(self, events: int) -> None:
        """Send and read. Raises `ProtocolError` if what arrives is not frames."""
        if self._stdin.frames:
            self.send()
        # A hang-up comes as an event of its own, asked for or not.
        if events & ~select.POLLOUT and self._may_read():
            self._receive()

    def _may_read(self) -> bool:
        ended = self.at_eof or self._streams.status is not None
        return not ended and self._output.size < _ENOUGH_OUTPUT

    def send(self) -> None:
        """Send what of stdin the proxy takes now."""
        try:
            sent = self._sock.send(self._stdin.frames, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except ConnectionError:
            # The process may have ended: what it has said to the last is still there to be read.
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
