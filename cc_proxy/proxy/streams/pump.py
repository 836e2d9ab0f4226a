"""One VM's I/O pump: a thread that copies frames between the I/O channel and the clients' fds.

Everything that is ready is read in one piece, taken apart in one walk, and written with one call for each
receiver. Nothing is copied on the way: what is written are slices of the buffer that was read into. So a
buffer is not read into again while slices of it wait, and that is all there is to back-pressure:
`Stdin.blocked`, the VM takes nothing and clients are not read; `Output.paused`, a client takes nothing and
the VM is not read.
"""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from cc_proxy.api.status import Streams
from cc_proxy.hyperstart.pacing import FIRST_MARKER
from cc_proxy.linux.fds import close_stream
from cc_proxy.linux.selector import NOTHING_ELSE, READ, WRITE, Selector
from cc_proxy.linux.threads import start_thread
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.spin import Eager
from cc_proxy.proxy.streams.counters import Counters
from cc_proxy.proxy.streams.mailbox import Mailbox
from cc_proxy.proxy.streams.output import FramingLost, Output
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.stats import describe_streams
from cc_proxy.proxy.streams.stdin import Stdin
from cc_proxy.proxy.turns import Turns
from cc_proxy.proxy.users import Share
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink, ControlLost


class Owner(Protocol):
    """Whose pump it is; called by the pump thread, with nothing locked."""

    container_id: str

    def lose(self, cause: str) -> None:
        """The VM is lost. May be called again."""

    def ended(self) -> None:
        """The pump has closed everything and is about to end."""


class Pump:
    """Owner of the VM's I/O socket, its console and its sessions. Its thread ends when all is delivered."""

    def __init__(
        self,
        owner: Owner,
        io: socket.socket,
        control: ControlLink,
        console: Console | None,
        echo_timeout: float,
        share: Share,
    ) -> None:
        """`share` is whose part of the interpreter it takes."""
        io.setblocking(False)
        self._owner = owner
        self._vm = vm = owner.container_id
        self._io = io
        self._io_fd = io.fileno()
        self._control = control
        self._console = console
        self._share = share
        self._turns = Turns(share)
        self.counters = Counters()

        self._asked = False  # the pump thread has been asked whether it is alive; it takes that back
        # While the thread waits, and nothing here changes: a new one each time. None while it does not.
        self._wait_now: object | None = None

        # From here on the pump thread's.
        self._sessions: set[Session] = set()
        self._owners: dict[int, Session] = {}  # by seq
        with contextlib.ExitStack() as undo:
            self._selector = Selector()  # for all but the clients
            undo.callback(self._selector.close)
            self._mailbox = Mailbox()
            undo.callback(self._mailbox.close)
            self._output = Output(
                vm, io, self._selector, self._owners, self.counters, self._mailbox.open, self._on_stray
            )
            self._stdin = Stdin(vm, io, self._owners, self.counters, echo_timeout, self._drop)
            undo.callback(self._stdin.clients.close)
            undo.pop_all()
        self._handlers: dict[int, Callable[[int], None]] = {
            self._io_fd: self._on_io,
            self._mailbox.fileno(): self._on_mail,
            control.unasked.fileno(): self._on_control,
            self._selector.fileno(): self._on_others,
        }
        if console:
            self._handlers[console.fileno()] = self._on_console
        self._io_events = (READ, NOTHING_ELSE)  # what the I/O channel is watched for
        self._io_open = True
        # Whether the VM and its clients speak in turn, so that an answer is to come at once. Of who speaks
        # without end more is to come, but the more at a time the better.
        self._conversing = self._vm_spoke_last = False
        self._eager = Eager()
        self._finish_at: float | None = None
        self._finish_cause = ""
        self._thread = threading.Thread(target=self._run, name=f"pump {vm[:32]}", daemon=True)

    # Any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to copy. Raises `RuntimeError` if there is no thread to be had; everything is closed then."""
        try:
            start_thread(self._thread)
        except BaseException:
            self._close()
            raise

    def add(self, session: Session) -> bool:
        """Take over a session: frames for its seqs reach it from now on. False if the pump has ended."""
        return self._mailbox.post(lambda: self._add(session))

    def describe(self) -> Streams | Future[Streams]:
        """Return how things stand, all of it at one moment, or ask the thread.

        Its answer comes after what it is at, so waiting for that needs a deadline; it is cancelled if the
        pump has ended.
        """
        return self._streams_meanwhile() or self._ask()

    def _streams_meanwhile(self) -> Streams | None:
        """Return how the streams are while the thread waits, which need not be woken for that."""
        wait = self._wait_now
        if wait is None or not self._mailbox.empty:  # which may have just got the asker's session
            return None
        try:
            streams = self._streams()
        except Exception:  # it is at it again; or something is wrong, which it will find out itself
            return None
        return streams if self._wait_now is wait else None

    def _ask(self) -> Future[Streams]:
        answer: Future[Streams] = Future()
        if not self._mailbox.post(lambda: self._tell(answer)):
            answer.cancel()
        return answer

    def finish(self, cause: str, after: float = 0.0) -> None:
        """In `after` seconds at the latest, close both channels, deliver what came by then, and end."""
        at = time.monotonic() + after
        self._mailbox.post(lambda: self._finish_by(at, cause))

    def abort(self) -> None:
        """End now, whatever waits."""
        self._mailbox.post(self._abort)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread's end; returns whether it has ended."""
        try:
            self._thread.join(timeout)
        except RuntimeError:  # it is about to be started, or just being
            return False
        return not self._thread.is_alive()

    @property
    def session_count(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def answers(self) -> bool:
        """Whether the thread has answered the last call of this, and ask it again. One thread at a time.

        One that waits for the VM, or for clients, answers at once; one that has not begun, or has ended,
        needs not.
        """
        if self._asked and self._thread.is_alive():
            return False
        self._asked = True
        self._mailbox.post(self._answer)
        return True

    def _answer(self) -> None:
        self._asked = False

    # Pump thread: the loop --------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._owner.ended)
            last_first.callback(self._contain, self._close)
            # Something to do for these two only after an error: what had arrived is still delivered.
            last_first.callback(self._contain, self._copy)
            last_first.callback(self._contain, self._finish_reading)
            last_first.callback(self._contain, self._watch_and_copy)

    def _contain(self, step: Callable[[], None]) -> None:
        """An error that nobody expected costs this VM."""
        try:
            step()
        except Exception:
            self._wait_now = None
            faults.note("I/O pump failed", vm=self._vm)
            self._owner.lose("internal error in its I/O pump")

    def _watch_and_copy(self) -> None:
        self._watch()
        self._copy()

    def _copy(self) -> None:
        turn = self._turn if self._share.exempt else self._fair_turn
        while self._is_in_use:
            turn()

    @property
    def _is_in_use(self) -> bool:
        return self._io_open or bool(self._sessions)

    def _fair_turn(self) -> None:
        """Do as `_turn`, but while other users are there no more at once, and no more often, than is fair."""
        if self._turns.alone():
            self._adapt(0.0)
            self._turn()
            return
        if self._share.contended:
            self._conversing = False  # to look all the time is not fair
        ready = self._wait()
        begun = time.monotonic()
        if self._turns.rest(self._mailbox.wait, self._may_rest):
            if not self._is_in_use:
                return
            ready = self._look()
        with self._share.one_pump():
            self._stdin.put_off_by(time.monotonic() - begun)
            frames, calls = self._frames, self._calls
            self._proceed(ready)
            done = self._frames - frames, self._calls - calls
            self._adapt(self._turns.charge(*done, self._conversing))

    def _may_rest(self) -> float:
        """Return for how many seconds: what has come by its end is still to be delivered."""
        if not self._io_open:
            return 0.0
        return math.inf if self._finish_at is None else self._finish_at - time.monotonic()

    def _adapt(self, stretch: float) -> None:
        self._output.adapt(stretch)
        self._stdin.most = self._output.most

    @property
    def _frames(self) -> int:
        return self.counters.frames_to_clients + self.counters.frames_to_vm

    @property
    def _calls(self) -> int:
        return self._output.sends + self._stdin.reads

    def _watch(self) -> None:
        """Wait for everything, in two epoll instances.

        `Stdin.clients` has the clients, the I/O channel, and the other instance as one of its fds; it is what
        is waited on, but not while the VM takes nothing. The I/O channel is in both, because to be woken
        through one instance inside the other takes longer.
        """
        for fd in self._handlers:
            if fd != self._selector.fileno():
                self._selector.add(fd, READ)
        self._selector.change(self._io_fd, NOTHING_ELSE)
        self._stdin.clients.add(self._selector.fileno(), READ)
        self._stdin.clients.add(self._io_fd, READ)

    def _turn(self) -> None:
        self._proceed(self._wait())

    def _wait(self) -> list[tuple[int, int]]:
        """Return what is ready, once something is or a timer is due."""
        timeout = self._timeout() if self._timed else None
        self._wait_now = object()
        ready = self._wait_for(timeout)
        self._wait_now = None
        return ready

    def _wait_for(self, timeout: float | None) -> list[tuple[int, int]]:
        if not self._reads_clients:
            return self._selector.poll(timeout)
        poll = self._stdin.poll
        if not self._conversing:
            return poll(timeout)
        return self._eager.wait(lambda: poll(0) or None, lambda: poll(timeout))

    def _look(self) -> list[tuple[int, int]]:
        """Return what is ready now."""
        return self._stdin.poll(0) if self._reads_clients else self._selector.poll(0)

    def _proceed(self, ready: list[tuple[int, int]]) -> None:
        """Do what there is to do about it."""
        if self._reads_clients:
            self._serve_all(ready)
        else:
            self._serve(ready)
        if self._timed:
            self._run_timers(time.monotonic())
        self._watch_io()

    @property
    def _reads_clients(self) -> bool:
        return self._io_open and not self._stdin.blocked

    def _serve_all(self, ready: list[tuple[int, int]]) -> None:
        """Serve what is ready, the clients all together."""
        clients = []
        for pair in ready:
            handler = self._handlers.get(pair[0])
            if handler:
                handler(pair[1])
            else:
                clients.append(pair)
        if clients and self._reads_clients:
            self._conversing, self._vm_spoke_last = self._vm_spoke_last, False
            self._share.works(self._conversing)
            self._stdin.read_clients(clients)

    def _serve(self, ready: list[tuple[int, int]]) -> None:
        """Serve what is ready of all but what clients send."""
        for fd, events in ready:
            handler = self._handlers.get(fd)
            if handler:
                handler(events)
            elif fd in self._output.waiting:
                self._on_writable(self._output.waiting[fd])

    @property
    def _timed(self) -> bool:
        if self._output.paused or self._stdin.asked or self._stdin.blocked:
            return True
        return self._finish_at is not None

    def _timeout(self) -> float | None:
        """Requires that something is `_timed`."""
        moments = [*self._output.moments()]
        if not self._output.paused:
            moments += self._stdin.moments()
        if self._finish_at is not None:
            moments.append(self._finish_at)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _run_timers(self, now: float) -> None:
        if self._finish_at is not None and now >= self._finish_at:
            self._finish_at = None
            self._lose(self._finish_cause)
        self._output.run_timers(now)
        if self._output.paused:
            self._stdin.put_off(now)
        else:
            self._stdin.run_timers(now)

    def _watch_io(self) -> None:
        """Watch the I/O channel and the clients for what can be done about them now."""
        if self._stdin.error:
            self._lose(self._stdin.error)
        if not self._io_open:
            return
        reading = NOTHING_ELSE if self._output.paused else READ
        writing = WRITE if self._stdin.blocked else NOTHING_ELSE
        if (reading, writing) == self._io_events:
            return
        self._io_events = (reading, writing)
        # While the VM takes nothing only _selector is waited on, so that is where it has to be seen.
        self._selector.change(self._io_fd, reading | writing if writing else NOTHING_ELSE)
        self._stdin.clients.change(self._io_fd, reading)

    # Pump thread: what is ready ---------------------------------------------------------------------------

    def _on_mail(self, _events: int) -> None:
        self._mailbox.receive()

    def _streams(self) -> Streams:
        return describe_streams(self._sessions, self._output, self._stdin, self.counters)

    def _tell(self, answer: Future[Streams]) -> None:
        try:
            answer.set_result(self._streams())
        except Exception as error:  # whatever it is, a question must not end the pump
            answer.set_exception(error)

    def _on_control(self, _events: int) -> None:
        try:
            self._control.read_unasked()
        except ControlLost as lost:
            self._lose(str(lost))

    def _on_console(self, _events: int) -> None:
        try:
            ended = self._console is not None and not self._console.read()
        except Exception:  # whatever it is, the VM's streams can do without the console
            faults.note("console failed", vm=self._vm)
            ended = True
        if ended:
            self._close_console()

    def _close_console(self) -> None:
        if self._console:
            del self._handlers[self._console.fileno()]
            self._selector.remove(self._console.fileno())
            self._console.close()
            self._console = None

    def _on_io(self, events: int) -> None:
        if events == READ and self._io_open and not self._output.paused:
            self._read_vm()  # what there is nearly always
            return
        if events & WRITE and self._stdin.blocked:
            self._share.works()
            self._stdin.flush()
        if not events & ~WRITE or not self._io_open:
            return
        if self._output.paused:
            # A hang-up is noticed even while it is not read.
            self._lose("the VM hung up its I/O channel")
        else:
            self._read_vm()

    def _read_vm(self) -> None:
        self._conversing, self._vm_spoke_last = not self._vm_spoke_last, True
        self._share.works(self._conversing)
        try:
            size = self._output.read()
        except BlockingIOError:
            return
        except (FramingLost, OSError) as error:
            self._lose(f"I/O channel: {error}")
            self._end_io()
            return
        if not size:
            self._lose("the VM hung up its I/O channel")
            self._end_io()

    def _on_others(self, _events: int) -> None:
        self._serve(self._selector.poll(0))

    def _on_writable(self, session: Session) -> None:
        self._share.works()
        try:
            self._output.flush(session)
        except Exception:
            self._drop(session, "internal error")  # so that the others still get what waits for them
            raise
        if not self._io_open and not session.waits:
            self._drop(session, "all is delivered")

    def _on_stray(self, seq: int) -> None:
        if seq >= FIRST_MARKER:
            self._stdin.echo(seq)
        else:
            self.counters.stray_frames += 1

    # Pump thread: sessions --------------------------------------------------------------------------------

    def _add(self, session: Session) -> None:
        if not self._io_open:
            session.close()
            return
        self._sessions.add(session)
        self._owners.update(dict.fromkeys(session.seqs, session))
        self._stdin.add(session)

    def _drop(self, session: Session, reason: str) -> None:
        """Close a session if it is not closed yet. Output on its streams is nobody's from now on."""
        if session not in self._sessions:
            return
        logger.debug("session closed", extra={"vm": self._vm, "stream": session.seqs.start, "reason": reason})
        self._sessions.remove(session)
        with contextlib.closing(session):
            for seq in session.seqs:
                self._owners.pop(seq, None)
            self._stdin.forget(session)
            self._output.forget(session)

    # Pump thread: the end ---------------------------------------------------------------------------------

    def _lose(self, cause: str) -> None:
        """The VM is of no use any more: deliver what it has sent, then its clients see end of file."""
        self._owner.lose(cause)
        self._finish_reading()

    def _finish_by(self, at: float, cause: str) -> None:
        self._finish_cause = cause
        self._finish_at = at if self._finish_at is None else min(at, self._finish_at)

    def _finish_reading(self) -> None:
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
        self._selector.remove(self._io_fd)
        self._stdin.clients.remove(self._io_fd)
        self._selector.remove(self._control.unasked.fileno())
        del self._handlers[self._control.unasked.fileno()]
        self._control.close()
        close_stream(self._io)
        for session in list(self._sessions):
            self._stdin.forget(session)
            if not session.waits:
                self._drop(session, "the VM's I/O channel is closed")

    def _abort(self) -> None:
        with contextlib.ExitStack() as every_one:
            for session in self._sessions:
                every_one.callback(self._drop, session, "the daemon stops")
            every_one.callback(self._end_io)

    def _close(self) -> None:
        """Close whatever is open, in whatever state the thread has ended and whatever else fails now."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._let_go)
            last_first.callback(self._selector.close)
            last_first.callback(self._stdin.clients.close)
            last_first.callback(self._control.close)
            last_first.callback(self._close_console)
            last_first.callback(self._mailbox.open)
            last_first.callback(self._abort)
            last_first.callback(self._mailbox.close)

    def _let_go(self) -> None:
        """Undo what refers to this in a circle: or the buffers would stay until a collector comes by."""
        self._handlers.clear()
        del self._output, self._stdin
