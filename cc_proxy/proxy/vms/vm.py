"""One VM, from hello to its end, with its control channel and its pump."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from cc_proxy.api.payloads import Hello
from cc_proxy.api.status import Streams
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, MAX_COMMAND, ControlMessage, OnAnswer
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.hyperstart.stdio import STARTS, stdio_seqs
from cc_proxy.linux.fds import check_passable, refuse_rights
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.interfaces import Pacing
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.session import Session, Whose
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from cc_proxy.proxy.users import User
from cc_proxy.proxy.vms.boot import Boot, NotReady
from cc_proxy.proxy.vms.control import ControlLink, ControlLost, NoAnswer, NotSent
from cc_proxy.proxy.vms.dialer import Dialer, Peer
from cc_proxy.proxy.vms.states import MOVES, State, Trouble
from cc_proxy.settings import LiveSettings

_SESSION_SEND_BUFFER = 256 * 1024
#: The cause of every VM's end once the daemon stops.
_STOPS = "the daemon stops"


class VmError(Exception):
    """Something failed in a VM; the text is the cause, as clients are told it."""


class Vm:
    """A VM that a client has said hello for. Any thread may call.

    `owner` is the uid of that client. `on_change` is called, with no lock held, when the VM has moved to
    another state, with that state; by then it may be in yet another.
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
        self.created = time.monotonic()
        #: The last thing that went wrong. Any thread replaces it as a whole.
        self.trouble: Trouble | None = None
        #: Whether something went wrong that ended it, or kept it from coming up.
        self.failed = False
        #: Whether it was ever up.
        self.came_up = False
        #: What its channels are connected to. Guarded by the registry's lock.
        self.peers: set[Peer] = set()
        self._live = live
        self._space = space
        self._on_change = on_change
        # The thread that says hello sets these once; the pump thread drops _pump at its end.
        self._boot: Boot | None = None
        self._control: ControlLink | None = None
        self._pump: Pump | None = None
        self._stopping = False  # whether the daemon stops; set once
        # Guards what follows against changes by two threads; reading one of them takes no lock. Innermost.
        self._lock = threading.Lock()
        self._state = State.STARTING
        self._cause = ""
        self._ends = 0  # commands on their way that power it off
        self._next_seq = 1

    # A client's thread ------------------------------------------------------------------------------------

    def start(self, hello: Hello, dialer: Dialer, user: User) -> None:
        """Connect to the VM and wait until it is ready. Raises `VmError`; nothing is left open then."""
        try:
            pump = self._connect(hello, dialer, user)
            pump.start()
            if not self._move(State.UP):
                raise VmError(self._gone())
        except BaseException as error:
            self._fail(str(error))
            self.abort()
            self._move(State.GONE)
            if isinstance(error, NotReady):
                raise VmError(str(error)) from None
            if isinstance(error, OSError | RuntimeError):
                raise VmError(f"the daemon is short of resources: {error}") from None
            raise

    def command(self, name: Code, payload: bytes) -> ControlMessage:
        """Have the agent carry out a command; returns its ACK. Raises `VmError`."""
        length = HEADER.size + len(payload)
        if length > MAX_COMMAND:
            raise VmError(f"message too long {length}")
        pump, stdio = self._pump, stdio_seqs(payload) if name in STARTS else []

        def answered(answer: ControlMessage) -> None:
            if answer.code == Code.ERROR:
                self._keep_on(name)
            elif pump and stdio:
                pump.open_stdin(stdio)

        if pump and stdio:
            pump.expect_processes(stdio)
        return self._command(name, payload, answered)

    def _command(self, name: Code, payload: bytes, on_answer: OnAnswer) -> ControlMessage:
        control = self._control
        if control is None or self._state not in (State.UP, State.LEAVING):
            raise VmError(self._gone())
        if name is Code.DESTROY_POD:
            self._expect_end(1)
        try:
            answer = control.transact(name, payload, self._live.current.vm.command_timeout, on_answer)
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
        except Exception:  # the channel is in an unknown state now
            faults.note("control channel failed", vm=self.container_id, command=name.hyper_name)
            self.lose("internal error in its control channel")
            raise VmError(self._gone()) from None
        if answer.code == Code.ERROR:
            said = answer.payload.decode(errors="replace")
            refusal = "ERROR received from Hyperstart" + (f": {said}" if said else "")
            self.trouble = Trouble(f"{name.hyper_name}: {refusal}", time.monotonic())
            raise VmError(refusal)
        return answer

    def open_session(self, n_streams: int, user: User, pid: int = 0) -> tuple[int, socket.socket]:
        """Allocate streams for a client: `user` is whose it is, `pid` its process.

        Returns the first one's seq, and the end of their fd that is the client's. Raises `VmError` or
        `LimitReached`; no seq is used up then.
        """
        pump = self._pump
        if pump is None or self._state not in (State.UP, State.LEAVING):
            raise VmError(self._gone())
        with contextlib.ExitStack() as undo:
            charge = undo.enter_context(user.charge("sessions"))
            ours, theirs = _session_pair()
            undo.callback(theirs.close)
            undo.callback(ours.close)
            with self._lock:
                seqs = range(self._next_seq, self._next_seq + n_streams)
                self._next_seq = seqs.stop
            window = self._live.current.stdin.window
            paced = StdinWindow(seqs.start, window) if window else None
            who = Whose(self.container_id, user.uid, pid)
            session = Session(seqs, ours, who, Spool(self._space, user.uid), paced, charge.give_back)
            if not pump.add(session):
                raise VmError(self._gone())
            undo.pop_all()  # now they are the pump's
        return seqs.start, theirs

    def _expect_end(self, more: int) -> None:
        with self._lock:
            self._ends += more

    def _keep_on(self, refused: Code) -> None:
        """The agent does not carry out a command, so that does not end the VM either."""
        if refused is Code.DESTROY_POD:
            self._expect_end(-1)

    def _connect(self, hello: Hello, dialer: Dialer, user: User) -> Pump:
        """Connect to the VM and return its pump, not yet started. Raises the same as `Boot.run`."""
        self._boot = Boot(hello, self._live.current.vm)
        with contextlib.ExitStack() as undo:
            ready = undo.enter_context(self._boot.run(dialer))
            self._control, self._next_seq = ready.control, ready.first_seq
            pacing = Pacing(self._live.current.stdin.echo_timeout, self._acknowledge)
            self._pump = Pump(self, ready.io, ready.control, ready.console, user.one_batch, pacing)
            undo.pop_all()
        return self._pump

    def _acknowledge(self, pings: int, done: Callable[[bool], None]) -> None:
        """Have the agent answer so many pings, one at a time, so that no command waits for more than one."""

        def answered(_answer: ControlMessage) -> None:
            if pings > 1:
                self._acknowledge(pings - 1, done)
            else:
                done(True)

        if self._control:
            self._control.post(Code.PING, answered, functools.partial(done, False))

    # Pump thread ------------------------------------------------------------------------------------------

    def ended(self) -> None:
        """The pump has delivered everything and closed both channels."""
        self._move(State.GONE)
        self._pump = None  # or a client that stays attached would keep the pump's buffers

    # Any thread -------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state, at this moment."""
        return self._state

    @property
    def is_gone(self) -> bool:
        """Whether it was up, and was then lost or powered off without a bye."""
        return self.came_up and self._state in (State.LOST, State.GONE)

    def leave(self) -> None:
        """Bye was said. End when the VM hangs up, or at the end of the linger."""
        pump = self._pump
        if self._move(State.LEAVING) and pump:
            pump.finish("it has lingered long enough after bye", self._live.current.vm.bye_linger)

    def lose(self, cause: str) -> None:
        """The VM is lost because of `cause`. Threads that wait for its answer are told."""
        with self._lock:
            self._cause = self._cause or cause
            expected = self._ends > 0 or self._stopping or self._state is State.LEAVING
            if not expected and State.LOST in MOVES[self._state]:
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
        """The control channel, for its figures; None before the VM is up."""
        return self._control

    def describe(self) -> Future[Streams] | None:
        """Ask for the state of its streams (`Pump.describe`); None while it has no pump."""
        pump = self._pump
        return pump.describe() if pump else None

    def stop(self) -> None:
        """The daemon stops. Deliver what the VM has sent by now, and end."""
        pump, boot = self._pump, self._boot
        self._stopping = True
        if pump:
            pump.finish(_STOPS)
        elif boot:
            boot.give_up(_STOPS)

    def abort(self) -> None:
        """End now, without delivering what waits."""
        pump = self._pump
        if pump:
            pump.abort()

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the VM's end; returns whether it has ended."""
        pump = self._pump
        return pump is None or pump.join(timeout)

    @property
    def sessions(self) -> int:
        """The number of its clients' sessions."""
        pump = self._pump
        return pump.session_count if pump else 0

    def probe(self) -> bool:
        """Return whether its pump has answered the last probe; if so, send another. One thread at a time."""
        pump = self._pump
        return pump is None or pump.probe()

    def _fail(self, cause: str) -> None:
        """Record an end that nobody asked for. The first cause counts."""
        if not self.failed:
            self.trouble = Trouble(cause, time.monotonic())
            self.failed = True

    def _move(self, to: State) -> bool:
        """Move to another state; returns False, and changes nothing, if that is not a legal move."""
        with self._lock:
            if to not in MOVES[self._state]:
                return False
            self._state = to
            self.came_up = self.came_up or to is State.UP
        self._on_change(self, to)
        return True

    def _gone(self) -> str:
        return f"VM gone: {self._cause or 'it was unregistered'}"


def _session_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a session's socket pair, ours and then the client's. Raises `VmError`."""
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
