"""One VM: its life from hello to the end, with its control channel and its pump."""

import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum, auto
from typing import NamedTuple

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.payloads import Hello
from cc_proxy.api.status import Streams
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, MAX_COMMAND, ControlMessage
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.linux.fds import check_passable, refuse_rights
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.turns import Place
from cc_proxy.proxy.users import Share
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink, ControlLost, NoAnswer, NotSent
from cc_proxy.proxy.vms.dialer import CannotConnect, Dialer
from cc_proxy.settings import LiveSettings

#: A socket is writable again when three quarters of this are free: the rest must last until more is there.
_SEND_BUFFER = 1024 * 1024
_SESSION_SEND_BUFFER = 256 * 1024
#: Seconds of a CPU that an event, a read, or so many bytes of one are taken for: more than it takes; an agent
#: needs few of them.
_EVENT = 0.000_02
_BYTES = 4096
#: Why everything ends some time.
_STOPS = "the daemon stops"


class VmError(Exception):
    """What was asked of the VM did not work; the text is the cause, as clients are told it."""


class Trouble(NamedTuple):
    """What went wrong, and when (`time.monotonic`)."""

    text: str
    at: float


class State(Enum):
    """Where a VM is in its life."""

    STARTING = auto()  # hello has begun
    UP = auto()
    LEAVING = auto()  # bye was said: the clients it has may stay until the linger is over
    LOST = auto()  # what it has sent is still delivered
    ENDED = auto()


_MOVES = {
    State.STARTING: {State.UP, State.LOST, State.ENDED},
    State.UP: {State.LEAVING, State.LOST, State.ENDED},
    State.LEAVING: {State.LOST, State.ENDED},
    State.LOST: {State.ENDED},
    State.ENDED: set[State](),
}


class Vm:
    """A VM that a client has said hello for. Any thread may call.

    `owner` is the uid of that client. `on_change` is called, with no lock held, when the VM has moved to
    another state, with that: by the time, there may be yet another.
    """

    def __init__(
        self,
        container_id: str,
        owner: int,
        live: LiveSettings,
        space: SpoolSpace,
        on_change: Callable[["Vm", State], None],
    ) -> None:
        self.container_id = container_id
        self.owner = owner
        self._live = live
        self.created = time.monotonic()
        #: What went wrong last. Set as a whole, by any thread.
        self.trouble: Trouble | None = None
        #: Whether that was its end, or that it never came up.
        self.failed = False
        self._space = space
        self._on_change = on_change
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._state = State.STARTING
        self._cause = ""
        self._powering_off = False  # it was told to
        self._stopping = False  # the daemon is
        self._next_seq = 1
        self._control: ControlLink | None = None
        self._pump: Pump | None = None

    @property
    def state(self) -> State:
        """Where the VM is in its life."""
        return self._state

    def start(self, hello: Hello, dialer: Dialer) -> None:
        """Connect to the VM and wait until it is ready. Raises `VmError`; nothing is left open then."""
        try:
            with contextlib.ExitStack() as undo:
                pump = self._connect(hello, dialer, undo)
                undo.pop_all()
            pump.start()
            if not self._move(State.UP):
                raise VmError(self._gone())
        except BaseException as error:
            self._fail(str(error))
            self.abort()
            self._move(State.ENDED)
            if isinstance(error, CannotConnect | ControlLost | NoAnswer):
                raise VmError(str(error)) from None
            if isinstance(error, OSError | RuntimeError):
                raise VmError(f"the daemon is short of resources: {error}") from None
            raise

    def command(self, name: Code, payload: bytes) -> ControlMessage:
        """Have the agent carry out a command; returns its ACK. Raises `VmError`."""
        length = HEADER.size + len(payload)
        if length > MAX_COMMAND:
            raise VmError(f"message too long {length}")
        control = self._control
        if control is None or self._state not in (State.UP, State.LEAVING):
            raise VmError(self._gone())
        if name is Code.DESTROY_POD:
            self._powering_off = True
        try:
            answer = control.transact(name, payload, self._live.current.vm.command_timeout)
        except NoAnswer as error:
            if isinstance(error, NotSent):
                self._keep_on(name)
            fields = {"vm": self.container_id, "command": name.hyper_name, "error": str(error)}
            logger.warning("command not answered", extra=fields)
            self.trouble = Trouble(f"{name.hyper_name}: {error}", time.monotonic())
            raise VmError(str(error)) from None
        except ControlLost as lost:
            self.lose(str(lost))
            raise VmError(self._gone()) from None
        except Exception:  # nobody knows what state the channel is in now
            faults.note("control channel failed", vm=self.container_id, command=name.hyper_name)
            self.lose("internal error in its control channel")
            raise VmError(self._gone()) from None
        if answer.code == Code.ERROR:
            self._keep_on(name)
            said = answer.payload.decode(errors="replace")
            refusal = "ERROR received from Hyperstart" + (f": {said}" if said else "")
            self.trouble = Trouble(f"{name.hyper_name}: {refusal}", time.monotonic())
            raise VmError(refusal)
        return answer

    def _keep_on(self, refused: Code) -> None:
        """The agent does not carry out a command: if that was to power off, it is not expected to end."""
        if refused is Code.DESTROY_POD:
            self._powering_off = False

    def open_session(self, n_streams: int, share: Share, pid: int = 0) -> tuple[int, socket.socket]:
        """Allocate streams for a client of `share`'s user, the process `pid`.

        Returns the first one's seq, and the end of their fd that is the client's. Raises `VmError` or
        `LimitReached`; no seq is used up then.
        """
        pump = self._pump
        if pump is None or self._state not in (State.UP, State.LEAVING):
            raise VmError(self._gone())
        with contextlib.ExitStack() as undo:
            share.take("sessions")
            undo.callback(share.give_back, "sessions")
            ours, theirs = _session_pair()
            undo.callback(theirs.close)
            undo.callback(ours.close)
            with self._lock:
                seqs = range(self._next_seq, self._next_seq + n_streams)
                self._next_seq = seqs.stop
            window = self._live.current.stdin.window
            paced = StdinWindow(seqs.start, window) if window else None
            session = Session(seqs, ours, self._space, share, paced)
            session.vm, session.pid = self.container_id, pid
            if not pump.add(session):
                raise VmError(self._gone())
            undo.pop_all()  # the pump's from now on
        return seqs.start, theirs

    def leave(self) -> bool:
        """Bye was said: end when the VM hangs up, or when the linger has passed. False if it is not up."""
        pump = self._pump
        if pump is None or not self._move(State.LEAVING):
            return False
        pump.finish("it has lingered long enough after bye", self._live.current.vm.bye_linger)
        return True

    def lose(self, cause: str) -> None:
        """The VM is of no use any more, because of `cause`. Who waits for its answer is told."""
        with self._lock:
            self._cause = self._cause or cause
            expected = self._powering_off or self._stopping or self._state is State.LEAVING
            if not expected and State.LOST in _MOVES[self._state]:
                self._fail(cause)
        if not self._move(State.LOST):
            return
        if expected:
            logger.info("VM gone", extra={"vm": self.container_id, "reason": cause})
        else:
            logger.warning("VM lost", extra={"vm": self.container_id, "error": cause})
        if self._control:
            self._control.hang_up()

    @property
    def control(self) -> ControlLink | None:
        """The control channel, to look at; None before there is one."""
        return self._control

    def describe(self) -> Streams | Future[Streams] | None:
        """Return how its streams stand, or ask (`Pump.describe`); None before there are any."""
        pump = self._pump
        return pump.describe() if pump else None

    def ended(self) -> None:
        """The pump has delivered everything and closed both channels."""
        self._move(State.ENDED)
        # A client that stays attached must not keep the pump's buffers.
        with self._lock:
            self._pump = None

    def stop(self) -> None:
        """The daemon stops: deliver what the VM has sent by now, and end."""
        pump, control = self._pump, self._control
        self._stopping = True
        if pump:
            pump.finish(_STOPS)
        elif control:
            control.hang_up(_STOPS)

    def abort(self) -> None:
        """End now, whatever waits."""
        pump = self._pump
        if pump:
            pump.abort()

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the VM's end; returns whether it has ended."""
        pump = self._pump
        return pump is None or pump.join(timeout)

    @property
    def sessions(self) -> int:
        """How many sessions its clients have."""
        pump = self._pump
        return pump.session_count if pump else 0

    def answers(self) -> bool:
        """Whether its pump has answered the last call of this. One thread at a time."""
        pump = self._pump
        return pump is None or pump.answers()

    def _connect(self, hello: Hello, dialer: Dialer, undo: contextlib.ExitStack) -> Pump:
        """Connect both channels and wait for READY, all in one time. What is opened is closed by `undo`."""
        limits = self._live.current.vm
        deadline = Deadline(limits.ready_timeout)
        ctl = undo.enter_context(dialer.connect("ctlSerial", hello.ctl_serial, deadline))
        share = dialer.share
        control = ControlLink(ctl, functools.partial(_note, self.container_id, share), Place(share).due)
        undo.callback(control.close)
        self._control = control
        io = undo.enter_context(dialer.connect("ioSerial", hello.io_serial, deadline))
        for channel in (ctl, io):
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        control.wait_until_up(io, limits.ready_timeout, limits.ready_ping_after, deadline.remaining())
        console = Console.open(self.container_id, hello.console, dialer)
        if console:
            undo.callback(console.close)
        self._pump = Pump(self, io, control, console, self._live.current.stdin.echo_timeout, share)
        return self._pump

    def _fail(self, cause: str) -> None:
        """It has come to an end that nobody asked for; the first cause counts."""
        if not self.failed:
            self.trouble = Trouble(cause, time.monotonic())
            self.failed = True

    def _move(self, to: State) -> bool:
        """Move to another state if that is a legal move from here."""
        with self._lock:
            if to not in _MOVES[self._state]:
                return False
            self._state = to
        self._on_change(self, to)
        return True

    def _gone(self) -> str:
        return f"VM gone: {self._cause or 'it was unregistered'}"


def _note(container_id: str, share: Share, size: int, events: list[ControlMessage]) -> None:
    if logger.isEnabledFor(logging.DEBUG):  # an agent sends two of them for each command
        for event in events:
            logger.debug("event from the VM", extra={"vm": container_id, "event": str(event)})
    share.spend((1 + len(events) + size // _BYTES) * _EVENT, _EVENT)


def _session_pair() -> tuple[socket.socket, socket.socket]:
    """Make the two ends of a session's fd, ours and the client's. Raises `VmError`."""
    with contextlib.ExitStack() as undo:
        try:
            pair = socket.socketpair()
            for end in pair:
                undo.enter_context(end)
            refuse_rights(pair[0])
            for end in pair:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SESSION_SEND_BUFFER)
            check_passable(*pair)
        except OSError as error:
            raise VmError(f"the daemon is short of resources: {error.strerror}") from None
        undo.pop_all()
    return pair
