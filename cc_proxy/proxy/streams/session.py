"""One client's streams: what waits for the client, and what its process may be sent."""

import contextlib
import errno
import math
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from cc_proxy.continuity.cells import (
    ENDED,
    EXPECTED,
    FLAGS,
    GONE,
    MARKER,
    READING,
    SIZE_AT,
    SPLIT,
    SPOOLED,
    STARTED,
    TORN,
    WHERE_AT,
)
from cc_proxy.continuity.state.streams import SessionState
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.hyperstart.splitter import StdinSplitter
from cc_proxy.linux.fds import Fd, Piece, close_stream, cut, is_for_now, unread
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.intake import read_noted
from cc_proxy.proxy.streams.interfaces import Place
from cc_proxy.proxy.streams.outlet import Outlet
from cc_proxy.proxy.streams.spool import Spool

#: The errors of a socket whose client has gone.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
#: Seconds to wait for a client whose socket is full, before its output is spooled.
PATIENCE = 0.02
#: Seconds of patience that come back each second. One client can slow its VM down by this much at most.
_PATIENCE_REGAINED = 0.25


class Whose(NamedTuple):
    """The VM that streams belong to, and the user and process that asked for them."""

    vm: str
    uid: int
    pid: int


class Session:
    """The streams that one `allocateIO` gave out, and the proxy's end of their fd, which it owns.

    While the client keeps up, output goes straight to it. What its socket does not take is `pending`: slices
    of the pump's buffer, which keep the VM from being read. The client gets a moment to catch up. Then
    pending output moves to the spool, and later output goes behind it, until the client has read everything.

    Any thread makes a session; after that only the pump thread uses it.
    """

    def __init__(
        self,
        seqs: range,
        sock: socket.socket,
        whose: Whose,
        spool: Spool,
        window: StdinWindow | None,
        place: Place,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._spool = spool
        self._give_back, self._cell = place
        self._outlet = Outlet(sock, self._cell, TORN)
        self.vm, self.uid, self.pid = whose
        self._patience = PATIENCE
        self._patience_at = 0.0
        self._took_at = 0.0
        self.seqs = seqs
        self.fd = sock.fileno()
        self.splitter = StdinSplitter(seqs.start)
        #: None while stdin is not paced.
        self.window = window
        #: Output that still needs the pump's buffer. Everything read later goes behind it.
        self.pending: Sequence[Piece] = ()
        #: When to move `pending` to the spool; infinite if nothing is pending, or the spool refused it.
        self.patient_until = math.inf
        #: Why the spool has not taken what is pending.
        self.stuck = ""
        #: Whether its process has been started, so that stdin has somewhere to go.
        self.is_started = False
        #: Whether the client may still send stdin.
        self.stdin_open = True
        #: Whether the client cannot take output any more.
        self.output_gone = False

    def hand_over(self, *, expected: bool) -> SessionState:
        """Give up everything as a value, for `restore`. `expected`: `Routes.expect` was called."""
        now = time.monotonic()
        return SessionState(
            fd=Fd(self._sock.detach()),
            first_seq=self.seqs.start,
            seqs=len(self.seqs),
            uid=self.uid,
            pid=self.pid,
            expected=expected,
            started=self.is_started,
            stdin_open=self.stdin_open,
            output_gone=self.output_gone,
            splitter=self.splitter.state(),
            window=self.window.state() if self.window else None,
            pending=b"".join(self.pending),
            stuck=self.stuck,
            spool=self._spool.hand_over(),
            patience=self._patience,
            patient=None if self.patient_until == math.inf else self.patient_until - now,
            idle=now - self.idle_since,
        )

    def restore(self, state: SessionState) -> None:
        """Go on where another session with these streams stood."""
        now = time.monotonic()
        self.splitter.restore(state.splitter)
        self._spool.restore(state.spool)
        self.pending = (state.pending,) if state.pending else ()
        self.stuck = state.stuck
        self._patience, self._patience_at = state.patience, now - state.idle
        self.patient_until = math.inf if state.patient is None else now + state.patient
        self.is_started = state.started
        self.stdin_open, self.output_gone = state.stdin_open, state.output_gone
        self._store(state)

    def _store(self, state: SessionState) -> None:
        flags = {STARTED: state.started, ENDED: not state.stdin_open, GONE: state.output_gone}
        self._cell[FLAGS] = sum(flag for flag, is_so in flags.items() if is_so)
        self._cell[READING], self._cell[SPLIT] = 0, self.splitter.word()
        self._cell[SPOOLED] = self._spool.size
        if self.window:
            self._cell[MARKER] = self.window.generation
        if self.waits:
            self._outlet.tear()  # where frames begin in what waits is not kept

    def log_fields(self, **others: str | None) -> dict[str, object]:
        """Return the fields that every log line about these streams has."""
        return {"vm": self.vm, "stream": self.seqs.start, "pid": self.pid, "uid": self.uid, **others}

    # Output -----------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether output waits for the client to take more."""
        return bool(self.pending or self._spool.size)

    @property
    def spooled(self) -> int:
        """Bytes of the disk that its spool holds."""
        return self._spool.held

    @property
    def idle_since(self) -> float:
        """While output waits: when the client last took some, or when it began to wait."""
        return max(self._patience_at, self._took_at)

    def deliver(self, pieces: Sequence[Piece]) -> bool:
        """Pass output on, behind what waits; returns whether anything waits afterwards.

        While anything is `pending`, the buffer must not change.
        """
        if self.output_gone:
            return False
        if self.pending:
            self.pending = [*self.pending, *pieces]
            return True
        if self._spool.size:
            self.pending = pieces
            self.spill()
            return True
        try:
            self.pending = self._outlet.send(pieces)
        except OSError as error:
            self.fail(error)
        if self.pending:
            self.patient_until = self._end_of_patience()
            return True
        return False

    def flush(self) -> None:
        """The client takes output again, or has gone: pass on what waits, oldest first."""
        try:
            if self._spool.size:
                self._outlet.tear()  # files are sent in arbitrary pieces
                self._spool.drain_to(self.fd)
                self._cell[SPOOLED] = self._spool.size
            if self.pending and not self._spool.size:
                self.pending = self._outlet.send(self.pending)
        except OSError as error:
            if is_for_now(error):
                return
            self.fail(error)
        self._took_at = time.monotonic()
        if not self.waits:
            self._outlet.mend()
        if not self.pending:
            self._stop_being_patient()
            self.stuck = ""
        elif self.stuck or self._spool.size:
            self.spill()

    def look(self) -> None:
        """Look for what no event announces. To be called now and then while output waits.

        The client may have shut its fd for reading. While its socket is full, only a send shows that, even
        one of no bytes. And others may have made room in the spool.
        """
        try:
            self._sock.send(b"")
        except OSError as error:
            if not is_for_now(error):
                self.fail(error)
        if self.stuck:
            self.spill()

    def spill(self) -> None:
        """Move pending output to the spool, as far as it takes it. If any is left, `stuck` says why."""
        self._stop_being_patient()
        try:
            while self.pending and (stored := self._spool.append(self.pending)):
                self.pending = cut(self.pending, stored)
            self.stuck = "the spool is full" if self.pending else ""
        except OSError as error:
            self.stuck = f"the spool cannot be used: {error.strerror}"
        self._cell[SPOOLED] = self._spool.size

    def fail(self, error: OSError) -> None:
        """Give up output because of an error. A client that is still there sees its streams closed."""
        self.give_up_output()
        if error.errno not in _GONE:
            logger.error("output lost: its stream is closed", extra=self.log_fields(error=error.strerror))
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def give_up_output(self) -> None:
        """Drop what waits, and take no more output. Stdin that the client has sent is still read."""
        self.output_gone = True
        self._mark(GONE)
        self.pending = ()
        self.stuck = ""
        self.patient_until = math.inf
        self._spool.close()

    def _stop_being_patient(self) -> None:
        if self.patient_until < math.inf:
            self._patience = max(0.0, self.patient_until - time.monotonic())
            self.patient_until = math.inf

    def _end_of_patience(self) -> float:
        now = time.monotonic()
        regained = (now - self._patience_at) * _PATIENCE_REGAINED
        self._patience = min(PATIENCE, self._patience + regained)
        self._patience_at = now
        return now + self._patience

    # Input ------------------------------------------------------------------------------------------------

    def read(self, view: memoryview, start: int, room: int, turn: int) -> int:
        """Read what the client sent into `view[start:start + room]`; returns how many bytes, 0 at the end.

        The caller splits it next, and calls `note_split`. Raises `BlockingIOError` if there is nothing.
        """
        place = turn << WHERE_AT | start
        try:
            # Always as `large`: a doubt would cost the session, and between reading and noting other threads
            # may hold the GIL for milliseconds.
            return read_noted(self._sock, view[start : start + room], self._cell, place, large=True)
        except BlockingIOError:
            raise
        except OSError:
            return 0

    def note_split(self, turn: int) -> None:
        """What was read in this turn has been split."""
        self._cell[SPLIT] = turn << WHERE_AT | self.splitter.word()

    def note_unsent(self, size: int, turn: int) -> None:
        """This much of what was read and split in this turn waits for the VM."""
        self._cell[READING] = turn << WHERE_AT | size << SIZE_AT
        self.note_split(turn)

    def expect(self) -> None:
        """Its process may have been started."""
        self._mark(EXPECTED)

    def start(self) -> None:
        """Its process has been started."""
        self.is_started = True
        self._mark(EXPECTED | STARTED)

    def end_stdin(self) -> None:
        """The client sends no more stdin."""
        self.stdin_open = False
        self._mark(ENDED)

    def note_marker(self) -> None:
        """A marker is about to be sent."""
        if self.window:
            self._cell[MARKER] = self.window.generation

    def _mark(self, flag: int) -> None:
        self._cell[FLAGS] |= flag

    @property
    def unread(self) -> int:
        """Bytes that the client has sent and nobody has read yet."""
        return unread(self._sock)

    # The end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the fd: the client reads what was written to it and then end of file. What waits is lost."""
        try:
            self._spool.close()
            self.pending = ()
        finally:
            close_stream(self._sock)
            self._give_back()
