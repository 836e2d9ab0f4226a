"""Stdin: frames from the clients to one VM. The thread that drives the channel does everything here."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from cc_proxy.api.frames import encode_frame
from cc_proxy.continuity.cells import SENT_TURN, TURNS, VM_TORN
from cc_proxy.continuity.memory import BUFFER_SIZE, Memory
from cc_proxy.hyperstart.frames import frames_of
from cc_proxy.linux.fds import Piece
from cc_proxy.linux.selector import HANG_UP, NOTHING_ELSE, READ, Selector
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.dump import dump_frames
from cc_proxy.proxy.streams.outlet import Outlet
from cc_proxy.proxy.streams.pacer import Pacer
from cc_proxy.proxy.streams.session import Session

#: The most clients among which the buffer is divided in one turn.
_MOST_SHARES = 2
#: A turn ends when less of the buffer than this is left.
_LEAST_READ = 16 * 1024
#: Seconds between two looks for clients that have gone while the VM takes nothing.
_LOOK_INTERVAL = 1.0
#: Seconds that stdin waits for its process after its client has gone. By then every command that was on its
#: way has its answer.
_KEPT = 60.0


class Stdin:
    """Reads the clients and passes what they send to the I/O channel, paced for each of them.

    `drop` is called with a session that is over and why.
    """

    def __init__(
        self,
        vm: str,
        io: socket.socket,
        memory: Memory,
        clients: Selector,
        pacer: Pacer,
        drop: Callable[[Session, str], None],
    ) -> None:
        self._vm = vm
        self._outlet = Outlet(io, memory.cell, VM_TORN)
        self._clients = clients  # where their fds are watched
        self._pacer = pacer
        self._drop = drop
        self._cell = memory.cell
        self._buffer = memory.stdin
        self._view = memoryview(self._buffer)
        self._turn = 0  # counts the times that clients were read, modulo TURNS
        self._sessions: dict[int, Session] = {}  # by fd
        #: Clients that went before their process was started, in that order, and until when each is kept.
        self.orphans: dict[Session, float] = {}
        self._left_out: list[int] = []  # fds that were ready, in order, when the buffer was full
        self._to_vm: Sequence[Piece] = ()
        self._stalled_at = 0.0
        self._look_at = 0.0  # for clients that are gone, while the VM takes nothing
        #: Whether slices of the buffer still wait for the VM, so that no client can be read.
        self.blocked = False
        #: Bytes of stdin, as the agent gets them.
        self.bytes = 0
        #: Why the VM takes nothing any more.
        self.error: str | None = None

    @property
    def frames(self) -> int:
        """Frames of stdin, as the agent gets them: a long frame of a client's is several."""
        return self._pacer.frames - self._pacer.markers

    @property
    def to_vm(self) -> bytes:
        """What waits for the VM to take it."""
        return b"".join(self._to_vm)

    def restore(self, to_vm: bytes) -> None:
        """Go on with what waited for the VM in another one."""
        self._cell[SENT_TURN] = self._turn
        self._outlet.mend()
        if to_vm:
            self._to_vm = frames_of(memoryview(to_vm))
            self._block()

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
        return len(self._pacer.asked)

    def add(self, session: Session) -> None:
        """Take over a client. It is read once its process has been started (`resume`)."""
        self._sessions[session.fd] = session
        self._watch(session, NOTHING_ELSE)

    def forget(self, session: Session) -> None:
        """The session is to be closed."""
        self._sessions.pop(session.fd, None)
        self._pacer.forget(session)
        self.orphans.pop(session, None)
        self._clients.remove(session.fd)

    def read_clients(self, ready: list[tuple[int, int]]) -> None:
        """Read the clients that have sent something or hung up, and pass it all on in one write.

        `ready` are their fds with the events of each. Not while `blocked`.
        """
        pieces: list[Piece] = []
        used = 0
        self._turn = (self._turn + 1) % TURNS
        share = BUFFER_SIZE // min(len(ready), _MOST_SHARES)
        if self._left_out:
            ready = self._left_out_first(ready)
        for number, (fd, events) in enumerate(ready):
            if BUFFER_SIZE - used < _LEAST_READ:
                self._left_out = [fd for fd, _ in ready[number:]]
                break
            session = self._sessions.get(fd)
            if session is None:
                continue
            if events & READ:
                used += self._read(session, used, min(share, BUFFER_SIZE - used), events, pieces)
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

    def moments(self) -> Iterator[float]:
        """Yield when `run_timers` has something to do."""
        if self._to_vm:
            yield self._look_at
            return
        yield from self._pacer.moments()
        yield from list(self.orphans.values())[:1]

    def run_timers(self, now: float) -> None:
        """Ask again where a marker did not come back, and give up clients that have gone."""
        if not self._to_vm:
            self._send(self._pacer.run_timers(now))
            for session in [orphan for orphan, until in self.orphans.items() if now >= until]:
                self._drop(session, "closed by its client, and its process was not started")
        elif now >= self._look_at:
            self._look_at = now + _LOOK_INTERVAL
            self._give_up_gone()

    def _read(self, session: Session, start: int, room: int, events: int, pieces: list[Piece]) -> int:
        if session.window:
            room = min(room, self._pacer.room(session.window))
        try:
            size = session.read(self._view, start, room, self._turn)
        except BlockingIOError:
            return 0
        if not size:
            self._end(session, events, pieces)
            return 0
        splitter = session.splitter
        before, frames = splitter.payload_bytes, splitter.frames
        good = splitter.split(self._buffer, self._view, start, start + size)
        session.note_split(self._turn)
        if splitter.joints:
            splitter.join(self._view)
        self._pacer.frames += splitter.frames - frames
        self.bytes += sum(map(len, good))
        if logger.isEnabledFor(IO):
            dump_frames(self._vm, "stdin", good)
        pieces += good
        if splitter.error:
            self._drop(session, splitter.error)
        elif marker := self._pacer.sent(session, splitter.payload_bytes - before):
            pieces.append(marker)
            self._clients.change(session.fd, NOTHING_ELSE)
        return size

    def _end(self, session: Session, events: int, pieces: list[Piece]) -> None:
        """The client sends no more: it has closed that direction, or its fd.

        Closing the direction is end of file. So is closing the fd in the middle of sending stdin, as it is
        with a pipe; one that was never written to ends without a word.
        """
        gone = bool(events & HANG_UP) or session.output_gone
        said = session.splitter.at_eof or not session.stdin_open
        session.end_stdin()
        if not said and (session.splitter.payload_bytes or not gone):
            pieces.append(end := encode_frame(session.seqs.start))
            self._pacer.frames += 1
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
        elif session in self._pacer.asked:
            self._clients.remove(session.fd)  # what it sent last is read when there is room for it
        elif not session.is_started and session.unread:
            self._clients.remove(session.fd)
            self.orphans[session] = time.monotonic() + _KEPT
        elif not session.is_started:
            self._drop(session, "closed by its client")
        # Else its marker has come back since it was looked at, in the same turn: it is being read again.

    def resume(self, session: Session) -> None:
        """Read a client again, or for the first time."""
        self.orphans.pop(session, None)
        if not session.stdin_open:
            return  # it has sent its last
        if self._clients.watches(session.fd):
            self._clients.change(session.fd, READ)
        else:
            self._watch(session, READ)

    def _watch(self, session: Session, events: int) -> None:
        try:
            self._clients.add(session.fd, events)
        except OSError as error:  # the kernel watches no more fds: that costs this client, and not the VM
            session.fail(error)
            self._drop(session, "it cannot be watched")

    def _block(self) -> None:
        self.blocked = True
        self._stalled_at = time.monotonic()
        self._look_at = self._stalled_at + _LOOK_INTERVAL

    def _send(self, pieces: Sequence[Piece]) -> None:
        if self._to_vm:
            self._to_vm = [*self._to_vm, *pieces]
            return
        try:
            self._to_vm = self._outlet.send(pieces) if pieces else ()
        except OSError as error:
            self.error = self.error or f"I/O channel: {os.strerror(error.errno or 0)}"
            return
        if self._to_vm:
            self._block()
        else:
            self._cell[SENT_TURN] = self._turn
