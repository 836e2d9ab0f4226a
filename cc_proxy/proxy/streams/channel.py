"""The I/O channel of one VM: frames between it and the clients' fds, step by step (docs/protocol.md, 3 and
4).

One call reads everything that is ready, one walk takes it apart, and one call for each receiver writes it.
Nothing is copied: slices of the buffer are written. While slices of a buffer wait, it is not read into again.
That is the back-pressure between the VM and its clients: while the VM takes nothing, clients are not read
(`Stdin.to_vm`); while a client takes nothing, the VM is not read (`Output.holding`). A client whose stdin
waits for the agent's acknowledgement is not read either.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Sequence

from cc_proxy.api.status import Streams
from cc_proxy.continuity.cells import FINISH_AT
from cc_proxy.continuity.memory import Memory
from cc_proxy.continuity.state.streams import ChannelState
from cc_proxy.linux.fds import Fd, close_stream
from cc_proxy.linux.selector import NOTHING_ELSE, READ, WRITE
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.intake import LARGE, Intake
from cc_proxy.proxy.streams.interfaces import Lost, Owner, Pacing, Sockets
from cc_proxy.proxy.streams.mailbox import Mailbox
from cc_proxy.proxy.streams.output import FramingLost, Output
from cc_proxy.proxy.streams.pacer import Pacer
from cc_proxy.proxy.streams.routes import Routes
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.stats import describe_streams, state_of
from cc_proxy.proxy.streams.stdin import Stdin
from cc_proxy.proxy.streams.watch import Ready, Watch

#: Seconds between two looks for what no event announces, while anything waits: a client that has gone or
#: will never read again, room in the spool, and an orphan whose time is up.
_LOOK_INTERVAL = 1.0
_HUNG_UP = "the VM hung up its I/O channel"


class Channel:
    """Owns the VM's I/O socket, what is watched beside it, and the sessions.

    One thread drives it: `wait`, then `serve`, as long as the channel `is_in_use`. It has no lock, so that
    thread alone may call the other methods too, unless they say otherwise.
    """

    def __init__(
        self, owner: Owner, sockets: Sockets, memory: Memory, mailbox: Mailbox, pacing: Pacing
    ) -> None:
        """Take over `sockets` and `memory`. `mailbox` stays the caller's; calls left in it are made here.

        Raises `OSError`; the caller keeps everything then.
        """
        io, control, console = sockets
        io.setblocking(False)
        self._owner, self._vm = owner, owner.container_id
        self._io = io
        self._control = control
        self._sessions: set[Session] = set()
        self._routes = Routes(self._resume)
        self._pacer = Pacer(
            io,
            self._routes.owners,
            pacing.echo_timeout,
            lambda pings, done: pacing.acknowledge(pings, mailbox.forwarded(done)),
            memory.cell,
            self._resume,
        )
        self._watch = Watch(self._on_writable)
        with contextlib.ExitStack() as undo:
            undo.callback(self._watch.close)
            # A read may bring the first output of a session that is still in the mailbox. So calls are made
            # between reading and delivering as well.
            intake, calls = Intake(io, memory.output, memory.cell), mailbox.make_calls
            others, echo = self._watch.others, self._pacer.echo
            self._output = Output(self._vm, intake, others, self._routes, calls, echo)
            self._stdin = Stdin(self._vm, io, memory, self._watch.clients, self._pacer, self._drop)
            self._watch.add_io(io.fileno(), self._on_io)
            self._watch.add(mailbox.fileno(), lambda _events: mailbox.receive())
            self._watch.add(control.fileno(), self._on_control)
            if console:
                self._watch.add_console(console, self._vm)
            undo.pop_all()
        self._io_open = True
        self._finish_at, self._finish_cause = math.inf, ""
        self._look_at = 0.0  # when to look next, if anything waits then
        self._bytes = 0  # all that has been read from the VM and the clients
        self._cell = memory.cell

    # Between two processes --------------------------------------------------------------------------------

    def hand_over(self) -> ChannelState:
        """Give up the I/O socket and the sessions as a value, for `restore`.

        The control channel and the console stay open. No thread may drive the channel any more.
        """
        finish_in = None if self._finish_at == math.inf else self._finish_at - time.monotonic()
        sessions = sorted(self._sessions, key=lambda session: session.seqs.start)
        states = [each.hand_over(expected=each.seqs.start in self._routes.owners) for each in sessions]
        streams = state_of(states, self._output, self._stdin, self._pacer)
        io = Fd(self._io.detach()) if self._io_open else None
        self._watch.close()
        self._let_go()
        return ChannelState(io, finish_in, self._finish_cause, streams)

    def restore(self, state: ChannelState, sessions: Sequence[Session]) -> None:
        """Go on where another channel of this VM stood. `sessions` are those of the state, in its order.

        Call before any thread drives the channel. Raises `OSError`.
        """
        self._sessions.update(sessions)
        for session, before in zip(sessions, state.streams.sessions, strict=True):
            self._routes.add(session)
            if before.expected:
                self._routes.expect(session.seqs.start)
        self._stdin.restore(state.streams, sessions)
        self._output.restore(state.streams, sessions)
        if state.finish_in is not None:
            self.finish_by(time.monotonic() + state.finish_in, state.finish_cause)
        self._watch_io()

    # Turn by turn -----------------------------------------------------------------------------------------

    @property
    def is_in_use(self) -> bool:
        """Whether anything is left to do: the VM is there, or clients have yet to get output."""
        return self._io_open or bool(self._sessions)

    @property
    def session_count(self) -> int:
        """How many sessions there are. Any thread."""
        return len(self._sessions)  # atomic under the GIL

    def wait(self) -> list[Ready]:
        """Wait until something is ready, or a timer is due; returns what is ready, for `serve`."""
        return self._watch.wait(self._timeout() if self._timed else None, self._reads_clients)

    def serve(self, ready: list[Ready]) -> bool:
        """Handle what `wait` returned; returns whether that was a large batch."""
        if self._reads_clients:
            clients = self._watch.serve(ready)
            if clients and self._reads_clients:  # a handler may just have changed that
                self._stdin.read_clients(clients)
        else:
            self._watch.serve_others(ready)
        if self._timed:
            self._run_timers(time.monotonic())
        self._watch_io()
        before, self._bytes = self._bytes, self._output.bytes + self._stdin.bytes
        return self._bytes - before >= LARGE

    def describe(self) -> Streams:
        """Return what `status` says of the streams."""
        return describe_streams(self._sessions, self._output, self._stdin, self._pacer)

    @property
    def _reads_clients(self) -> bool:
        return self._io_open and not self._stdin.to_vm

    @property
    def _looks(self) -> bool:
        """Whether anything waits whose end no event may announce."""
        return bool(self._output.waiting or self._stdin.to_vm or self._stdin.orphans)

    @property
    def _timed(self) -> bool:
        return bool(self._pacer.asked) or self._looks or self._finish_at < math.inf

    def _timeout(self) -> float | None:
        moment = min(self._finish_at, self._output.moment())
        if self._looks:
            moment = min(moment, self._look_at)
        if not self._stdin.to_vm and not self._output.holding:
            moment = min(moment, self._pacer.moment())
        return None if moment == math.inf else max(0.0, moment - time.monotonic())

    def _run_timers(self, now: float) -> None:
        if now >= self._finish_at:
            self._finish_at = math.inf
            self._lose(self._finish_cause)
        self._output.run_timers(now)
        if now >= self._look_at:
            self._look_at = now + _LOOK_INTERVAL
            self._output.look()
            self._stdin.look(now)
        if not self._io_open:
            self._drop_delivered()
        if self._output.holding:
            self._pacer.put_off(now)
        elif not self._stdin.to_vm:
            self._stdin.run_timers(now)

    def _watch_io(self) -> None:
        """Watch the I/O channel and the clients for what can be done about them now."""
        if self._stdin.error:
            self._lose(self._stdin.error)
        if self._io_open:
            reading = NOTHING_ELSE if self._output.holding else READ
            self._watch.set_io(reading, WRITE if self._stdin.to_vm else NOTHING_ELSE)

    # What is ready ----------------------------------------------------------------------------------------

    def _on_control(self, _events: int) -> None:
        try:
            self._control.read()
        except Lost as lost:
            self._lose(str(lost))

    def _on_io(self, events: int) -> None:
        if events & WRITE and self._stdin.to_vm:
            self._stdin.flush()
        if events == WRITE or not self._io_open:
            return
        if self._output.holding:
            self._lose(_HUNG_UP)  # epoll reports that even while nothing is read
            return
        try:
            size = self._output.read()
        except BlockingIOError:
            return
        except (FramingLost, OSError) as error:
            self._lose(f"I/O channel: {error}")
            return
        if not size:
            self._lose(_HUNG_UP)

    def _on_writable(self, fd: int) -> None:
        session = self._output.waiting.get(fd)
        if session is None:  # it was dropped after epoll reported its fd
            return
        try:
            self._output.flush(session)
        except Exception:
            self._drop(session, "internal error")  # so that the others still get what waits for them
            raise
        if not self._io_open and not session.waits:
            self._drop(session, "all is delivered")

    # Sessions ---------------------------------------------------------------------------------------------

    def add(self, session: Session) -> None:
        """Take over a session: frames for its seqs reach it from now on."""
        if not self._io_open:
            session.close()
            return
        self._sessions.add(session)
        self._routes.add(session)
        self._stdin.add(session)

    def expect_processes(self, seqs: Iterable[int]) -> None:
        """A command is about to be sent that starts processes with these seqs as stdio.

        Only from now on does an empty frame on one of them mean end of file.
        """
        for seq in seqs:
            self._routes.expect(seq)

    def open_stdin(self, seqs: Iterable[int]) -> None:
        """The processes with these seqs as stdio have started: read what clients send to them."""
        for seq in seqs:
            self._routes.start(seq)

    def _resume(self, session: Session) -> None:
        """Read a client: its process has been started, or its stdin has room again."""
        if self._io_open:
            self._stdin.resume(session)

    def _drop(self, session: Session, reason: str) -> None:
        """Close a session if it is not closed yet. Nobody owns its streams from now on."""
        if session not in self._sessions:
            return
        logger.debug("session closed", extra={"vm": self._vm, "stream": session.seqs.start, "reason": reason})
        self._sessions.remove(session)
        with contextlib.closing(session):
            self._routes.remove(session)
            self._stdin.forget(session)
            self._output.forget(session)

    # The end ----------------------------------------------------------------------------------------------

    def _lose(self, cause: str) -> None:
        """The VM is lost: deliver what it has sent, then let its clients read end of file."""
        self._owner.lose(cause)
        self.finish_reading()

    def finish_by(self, at: float, cause: str) -> None:
        """Close both channels at this moment (`time.monotonic`) at the latest; deliver what came by then."""
        self._finish_cause = cause
        self._finish_at = min(at, self._finish_at)
        self._cell[FINISH_AT] = int(self._finish_at * 1e9)

    def finish_reading(self) -> None:
        """Deliver what has arrived by now, and close both channels."""
        if not self._io_open:
            return
        try:
            with contextlib.suppress(OSError):
                self._output.read_rest()
        finally:
            self._end_io()

    def _end_io(self) -> None:
        """Close the I/O channel; sessions end as soon as everything is delivered."""
        if not self._io_open:
            return
        self._io_open = False
        self._watch.remove(self._io.fileno())
        self._watch.remove(self._control.fileno())
        self._control.close()
        close_stream(self._io)
        for session in self._sessions:
            self._stdin.forget(session)
        self._drop_delivered()

    def _drop_delivered(self) -> None:
        for session in list(self._sessions):
            if not session.waits:
                self._drop(session, "the VM's I/O channel is closed")

    def abort(self) -> None:
        """End every session and both channels now. What waits is lost."""
        with contextlib.ExitStack() as every_one:
            for session in self._sessions:
                every_one.callback(self._drop, session, "the daemon stops")
            every_one.callback(self._end_io)

    def close(self) -> None:
        """Close everything that is still open, even if closing some of it fails. Call it last, and once."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._let_go)
            last_first.callback(self._watch.close)
            last_first.callback(self._watch.close_console)
            last_first.callback(self.abort)

    def _let_go(self) -> None:
        """Break the reference cycles, or the buffers would stay until the garbage collector runs."""
        del self._output, self._stdin, self._watch, self._pacer, self._routes
