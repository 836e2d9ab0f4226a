"""Stdin: frames from the clients to one VM. The thread that drives the channel does everything here."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from cc_proxy.api.frames import encode_frame
from cc_proxy.hyperstart.pacing import marked_stream
from cc_proxy.linux.fds import Piece, send_pieces
from cc_proxy.linux.memory import new_buffer
from cc_proxy.linux.selector import HANG_UP, NOTHING_ELSE, READ, Selector
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.dump import dump_frames
from cc_proxy.proxy.streams.session import Session

_BUFFER_SIZE = 256 * 1024
#: So many clients share the buffer in a turn, if so many have sent something.
_MOST_SHARES = 2
#: A client is not read any more in a turn when less than this is left of it, or than a part of it.
_LEAST_READ = 16 * 1024
#: Seconds between two looks, while the VM takes nothing, for clients that are gone meanwhile.
_LOOK_INTERVAL = 1.0
#: An agent that has let so many markers pass, and never sent one back, is taken not to do that.
_MARKERS_TO_TRY = 10


class Stdin:
    """Reads the clients and passes what they send to the I/O channel, paced for each of them.

    `drop` is called with a session that is over and why.
    """

    def __init__(
        self,
        vm: str,
        io: socket.socket,
        clients: Selector,
        owners: Mapping[int, Session],
        echo_timeout: float,
        drop: Callable[[Session, str], None],
    ) -> None:
        self._vm = vm
        self._io = io
        self._clients = clients  # where their fds are watched
        self._owners = owners
        self._echo_timeout = echo_timeout
        self._drop = drop
        self._buffer = new_buffer(_BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._sessions: dict[int, Session] = {}  # by fd
        self._left_out: list[int] = []  # fds that were ready when the buffer was full, in their order
        self._to_vm: Sequence[Piece] = ()
        self._stalled_at = 0.0
        self._look_at = 0.0  # for clients that are gone, while the VM takes nothing
        self._echoed = False
        self._paced = True
        #: Whose marker is on its way, and when to ask again; oldest first.
        self.asked: dict[Session, float] = {}
        #: Whether slices of the buffer still wait for the VM, so that no client can be read.
        self.blocked = False
        #: Bytes and frames of stdin, as the agent gets them: a long frame of a client's is several.
        self.bytes = self.frames = 0
        #: Why the VM takes nothing any more.
        self.error: str | None = None

    @property
    def held(self) -> int:
        """Bytes that wait for the VM to take them."""
        return sum(map(len, self._to_vm))

    @property
    def stalled_since(self) -> float:
        """While `blocked`: since when the VM has taken nothing."""
        return self._stalled_at

    @property
    def unacknowledged(self) -> int:
        """Streams whose stdin waits until the agent has acknowledged what it was sent."""
        return len(self.asked)

    def add(self, session: Session) -> None:
        """Begin to read a client."""
        self._sessions[session.fd] = session
        self._clients.add(session.fd, READ)

    def forget(self, session: Session) -> None:
        """The session is to be closed."""
        self._sessions.pop(session.fd, None)
        self.asked.pop(session, None)
        self._clients.remove(session.fd)

    def read_clients(self, ready: list[tuple[int, int]]) -> None:
        """Read the clients that have sent something or hung up, and pass it all on in one write.

        `ready` are their fds with the events of each. Not while `blocked`.
        """
        pieces: list[Piece] = []
        used = 0
        share = _BUFFER_SIZE // min(len(ready), _MOST_SHARES)
        if self._left_out:
            ready = self._left_out_first(ready)
        for number, (fd, events) in enumerate(ready):
            if _BUFFER_SIZE - used < _LEAST_READ:
                self._left_out = [fd for fd, _ in ready[number:]]
                break
            session = self._sessions.get(fd)
            if session is None:
                continue
            if events & READ:
                used += self._read(session, used, min(share, _BUFFER_SIZE - used), events, pieces)
            else:
                self._hung_up(session)
        self._send(pieces)

    def _left_out_first(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        # epoll names them in the same order each time: those at the end would never have their turn.
        events = dict(ready)
        first = [(fd, events.pop(fd)) for fd in self._left_out if fd in events]
        self._left_out = []
        return [*first, *events.items()]

    def flush(self) -> None:
        """The VM takes something again."""
        pieces, self._to_vm, self.blocked = self._to_vm, (), False
        self._send(pieces)

    def echo(self, seq: int) -> None:
        """A marker came back."""
        if not self._paced:
            self._start_pacing()
            return
        session = self._owners.get(marked_stream(seq))
        if session is None or session.window is None or not session.window.echoed(seq):
            return
        self._echoed = True
        del self.asked[session]
        self._resume(session)

    def moments(self) -> Iterator[float]:
        """Yield when `run_timers` has something to do."""
        return iter([self._look_at] if self._to_vm else list(self.asked.values())[:1])

    def put_off(self, now: float) -> None:
        """The VM is not read: no marker can have come back, so their time begins anew."""
        self.asked = dict.fromkeys(self.asked, now + self._echo_timeout)

    def run_timers(self, now: float) -> None:
        """Ask again where a marker did not come back; give up clients that are gone while nobody is read."""
        if self._to_vm and now >= self._look_at:
            self._look_at = now + _LOOK_INTERVAL
            self._give_up_gone()
        while self.asked and not self._to_vm:
            session, ask_at = next(iter(self.asked.items()))
            if now < ask_at:
                break
            self._ask_again(session)

    def _read(self, session: Session, start: int, room: int, events: int, pieces: list[Piece]) -> int:
        window = session.window if self._paced else None
        if window:
            room = min(room, window.room)
        try:
            size = session.read_into(self._view[start : start + room])
        except BlockingIOError:
            return 0
        if not size:
            self._end(session, events, pieces)
            return 0
        splitter = session.splitter
        before, frames = splitter.payload_bytes, splitter.frames
        good = splitter.split(self._buffer, self._view, start, start + size)
        self.frames += splitter.frames - frames
        self.bytes += sum(map(len, good))
        if logger.isEnabledFor(IO):
            dump_frames(self._vm, "stdin", good)
        pieces += good
        if splitter.error:
            self._drop(session, splitter.error)
        elif window and (marker := window.sent(splitter.payload_bytes - before)):
            pieces.append(marker)
            self._clients.change(session.fd, NOTHING_ELSE)
            self.asked[session] = time.monotonic() + self._echo_timeout
        return size

    def _end(self, session: Session, events: int, pieces: list[Piece]) -> None:
        """The client sends no more: it has closed that direction, or its fd.

        Closing the direction is end of file. So is closing the fd in the middle of sending stdin, as it is
        with a pipe; one that was never written to ends without a word.
        """
        session.stdin_open = False
        gone = bool(events & HANG_UP) or session.output_gone
        if not session.splitter.at_eof and (session.splitter.payload_bytes or not gone):
            pieces.append(end := encode_frame(session.seqs.start))
            self.frames += 1
            self.bytes += len(end)
        if gone:
            self._drop(session, "closed by its client")
        else:
            self._clients.change(session.fd, NOTHING_ELSE)

    def _give_up_gone(self) -> None:
        """Close what is left of clients that are gone, unless something that they sent has yet to be read."""
        pieces: list[Piece] = []
        for fd, events in self._clients.poll(0):
            session = self._sessions.get(fd)
            if session and events & HANG_UP and not session.unread:
                self._end(session, events, pieces)
        self._send(pieces)

    def _hung_up(self, session: Session) -> None:
        """The client has closed its fd, while it was not being read."""
        if not session.stdin_open:
            self._drop(session, "closed by its client")
        elif session in self.asked:
            # What it sent last is still to be read, when there is room for it.
            self._clients.remove(session.fd)
        # Else its marker has come back since it was looked at, in the same turn: it is being read again.

    def _resume(self, session: Session) -> None:
        """Read a client again that was not read until its marker came back."""
        if self._clients.watches(session.fd):
            self._clients.change(session.fd, READ)
        else:
            self._clients.add(session.fd, READ)

    def _ask_again(self, session: Session) -> None:
        window = session.window
        if window is None:
            return
        del self.asked[session]
        if not self._echoed and window.asked >= _MARKERS_TO_TRY:
            self._stop_pacing()
            self._resume(session)
            return
        self.asked[session] = time.monotonic() + self._echo_timeout
        self._send([window.ask_again()])

    def _stop_pacing(self) -> None:
        logger.warning("the agent does not acknowledge stdin: it is sent unpaced", extra={"vm": self._vm})
        self._paced = False
        for session in self.asked:
            self._resume(session)
        self.asked.clear()

    def _start_pacing(self) -> None:
        logger.info("the agent acknowledges stdin after all: it is sent paced", extra={"vm": self._vm})
        self._paced = self._echoed = True
        for session in self._sessions.values():
            if session.window:
                session.window.reset()

    def _send(self, pieces: Sequence[Piece]) -> None:
        if self._to_vm:
            self._to_vm = [*self._to_vm, *pieces]
            return
        try:
            self._to_vm = send_pieces(self._io, pieces)
            self.blocked = bool(self._to_vm)
            if self.blocked:
                self._stalled_at = time.monotonic()
                self._look_at = self._stalled_at + _LOOK_INTERVAL
        except OSError as error:
            self.error = self.error or f"I/O channel: {os.strerror(error.errno or 0)}"
