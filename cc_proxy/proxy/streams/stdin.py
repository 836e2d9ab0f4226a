"""Stdin: frames from the clients to one VM. The thread that drives the channel does everything here."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence

from cc_proxy.api.frames import FRAME_HEADER, encode_frame
from cc_proxy.continuity.cells import SENT_TURN, TURNS, VM_TORN
from cc_proxy.continuity.memory import BUFFER_SIZE, Memory
from cc_proxy.continuity.state.streams import StreamsState
from cc_proxy.hyperstart.frames import HEADER_SIZE, frames_of
from cc_proxy.linux.fds import Piece
from cc_proxy.linux.selector import HANG_UP, NOTHING_ELSE, READ, Selector
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.dump import dump_frames
from cc_proxy.proxy.streams.intake import LARGE
from cc_proxy.proxy.streams.outlet import Outlet
from cc_proxy.proxy.streams.pacer import Pacer
from cc_proxy.proxy.streams.session import Session

#: Seconds that stdin waits for its process to start after its client has gone. By then every command that
#: was on its way has its answer.
_KEPT = 60.0


class Stdin:
    """Reads the clients and passes what they send to the I/O channel, paced for each of them.

    `drop` is called with a session that is over, and the reason.
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
        self._served = 0  # clients read in all the turns that had no room for everybody
        self._sessions: dict[int, Session] = {}  # by fd
        #: Clients that went before their process was started, and until when each is kept.
        self.orphans: dict[Session, float] = {}
        #: What the VM has not taken yet. While there is any, it occupies the buffer, and no client is read.
        self.to_vm: Sequence[Piece] = ()
        #: While there is any: the moment since which the VM has taken nothing.
        self.stalled_since = 0.0
        #: Bytes of stdin, with frames split as the agent gets them.
        self.bytes = 0
        #: Why the VM can be sent nothing any more.
        self.error: str | None = None

    def restore(self, state: StreamsState, sessions: Sequence[Session]) -> None:
        """Go on where another process stood, with what waited for the VM there."""
        self.bytes = state.traffic.bytes_to_vm
        self._pacer.restore(state.pacer, sessions)
        for session in sessions:
            self.add(session)
            if session.is_started and session not in self._pacer.asked:
                self.resume(session)
        self._cell[SENT_TURN] = self._turn
        self._outlet.mend()
        self.to_vm = frames_of(memoryview(state.to_vm))
        self.stalled_since = time.monotonic()
        if self.to_vm:
            self._note_unsent(sessions)

    def _note_unsent(self, sessions: Sequence[Session]) -> None:
        """Note whose stdin waits for the VM, as if it had been read just now: a kill would lose it."""
        sizes = Counter[int]()
        for frame in self.to_vm:
            seq, length = FRAME_HEADER.unpack_from(frame)
            sizes[seq] += length if length > HEADER_SIZE else 0  # an end of file is said again
        self._turn += 1
        for session in sessions:
            if session.seqs.start in sizes:
                session.note_unsent(sizes[session.seqs.start], self._turn)

    def add(self, session: Session) -> None:
        """Take over a client. It is read once its process has been started (`resume`)."""
        self._sessions[session.fd] = session
        self._watch(session, NOTHING_ELSE)

    def forget(self, session: Session) -> None:
        """Forget a session that is about to be closed."""
        self._sessions.pop(session.fd, None)
        self._pacer.forget(session)
        self.orphans.pop(session, None)
        self._clients.remove(session.fd)

    def read_clients(self, ready: list[tuple[int, int]]) -> None:
        """Read the clients that have sent something or hung up, and pass it all on in one write.

        `ready` has their fds with the events of each. Not while anything waits for the VM.
        """
        pieces: list[Piece] = []
        used = 0
        self._turn = (self._turn + 1) % TURNS
        # epoll reports them in the same order each time. So the next turn begins with those that find no room
        # in this one.
        first = self._served % len(ready)
        for number, (fd, events) in enumerate(ready[first:] + ready[:first]):
            if BUFFER_SIZE - used < LARGE:
                self._served += number
                break
            session = self._sessions.get(fd)
            if session is None:
                continue
            if events & READ:
                used += self._read(session, used, events, pieces)
            else:
                self._hung_up(session)
        self._send(pieces)

    def flush(self) -> None:
        """The VM takes something again."""
        pieces, self.to_vm = self.to_vm, ()
        self._send(pieces)

    def look(self, now: float) -> None:
        """Drop clients that have gone. To be called now and then, while there may be some."""
        if self.to_vm:  # no client is read now, but one that has hung up and left nothing to read can go
            pieces: list[Piece] = []
            for fd, events in self._clients.poll(0):
                client = self._sessions.get(fd)
                if client and events & HANG_UP and not client.unread:
                    self._end(client, events, pieces)
            self._send(pieces)
        for session in [orphan for orphan, until in self.orphans.items() if now >= until]:
            self._drop(session, "closed by its client, and its process was not started")

    def run_timers(self, now: float) -> None:
        """Ask again where a marker did not come back. Not while anything waits for the VM."""
        self._send(self._pacer.run_timers(now))

    def _read(self, session: Session, start: int, events: int, pieces: list[Piece]) -> int:
        room = BUFFER_SIZE - start
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
        payload, frames = splitter.payload_bytes, splitter.frames
        good = splitter.split(self._buffer, self._view, start, start + size)
        session.note_split(self._turn)
        if splitter.joints:
            splitter.join(self._view)
        payload, frames = splitter.payload_bytes - payload, splitter.frames - frames
        self._pacer.frames += frames
        self.bytes += payload + frames * HEADER_SIZE
        if logger.isEnabledFor(IO):
            dump_frames(self._vm, "stdin", good)
        pieces += good
        if splitter.error:
            self._drop(session, splitter.error)
        elif marker := self._pacer.sent(session, payload):
            pieces.append(marker)
            self._clients.change(session.fd, NOTHING_ELSE)
        return size

    def _end(self, session: Session, events: int, pieces: list[Piece]) -> None:
        """The client sends no more: it has closed that direction, or its fd.

        Closing the direction is end of file. So is closing the fd after sending stdin, as with a pipe. If the
        client never sent any, its process is told nothing.
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

    def _hung_up(self, session: Session) -> None:
        """The client has closed its fd while its stdin was not being read."""
        if not session.stdin_open:
            self._drop(session, "closed by its client")
        elif session in self._pacer.asked:
            self._clients.remove(session.fd)  # what it sent last is read when there is room for it
        elif not session.is_started and session.unread:
            self._clients.remove(session.fd)
            self.orphans[session] = time.monotonic() + _KEPT
        elif not session.is_started:
            self._drop(session, "closed by its client")
        # Otherwise its marker came back in this turn, after epoll had reported it: it is being read again.

    def resume(self, session: Session) -> None:
        """Read a client again, or for the first time."""
        self.orphans.pop(session, None)
        if not session.stdin_open:
            return  # nothing more will come
        if self._clients.watches(session.fd):
            self._clients.change(session.fd, READ)
        else:
            self._watch(session, READ)

    def _watch(self, session: Session, events: int) -> None:
        try:
            self._clients.add(session.fd, events)
        except OSError as error:  # the kernel watches no more fds, which costs this client and not the VM
            session.fail(error)
            self._drop(session, "it cannot be watched")

    def _send(self, pieces: Sequence[Piece]) -> None:
        if self.to_vm:
            self.to_vm = [*self.to_vm, *pieces]
            return
        try:
            self.to_vm = self._outlet.send(pieces) if pieces else ()
        except OSError as error:
            self.error = self.error or f"I/O channel: {os.strerror(error.errno or 0)}"
            return
        if self.to_vm:
            self.stalled_since = time.monotonic()
        else:
            self._cell[SENT_TURN] = self._turn
