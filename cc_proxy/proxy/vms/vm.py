"""One VM, from hello to its end, with its control channel and its pump."""

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from cc_proxy.api.payloads import Hello
from cc_proxy.api.status import Streams
from cc_proxy.continuity.cells import PROCESS_COMMANDED, PROCESS_STARTED, State
from cc_proxy.continuity.keeper import NOTHING, Keeper
from cc_proxy.continuity.state.vms import VmState
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, MAX_COMMAND, ControlMessage
from cc_proxy.hyperstart.stdio import STARTS, stdio_seqs
from cc_proxy.linux.fds import Fd
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.rest import Resting
from cc_proxy.proxy.streams.interfaces import Pacing, Sockets
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.users import User, Users
from cc_proxy.proxy.vms.boot import Boot, Channels
from cc_proxy.proxy.vms.commands import Asked
from cc_proxy.proxy.vms.control import ControlLink, NoAnswer, NotSent
from cc_proxy.proxy.vms.control_socket import ControlLost
from cc_proxy.proxy.vms.dialer import Dialer, Peer
from cc_proxy.proxy.vms.kept import Facts, KeptVm
from cc_proxy.proxy.vms.sessions import Sessions
from cc_proxy.proxy.vms.states import Life, Trouble, VmError
from cc_proxy.settings import LiveSettings

#: The cause of every VM's end once the daemon stops.
_STOPS = "the daemon stops"


class Vm:
    """A VM that a client has said hello for. Any thread may call.

    `owner` is the uid of that client. When the VM has moved to another state, `on_change` is called with that
    state, with no lock held; by then the VM may be in yet another.
    """

    def __init__(
        self,
        container_id: str,
        owner: int,
        live: LiveSettings,
        space: SpoolSpace,
        on_change: Callable[["Vm", State], None],
        keeper: Keeper = NOTHING,
    ) -> None:
        self.container_id = container_id
        self.owner = owner
        self.created = time.monotonic()
        #: What is kept of it in case this process is killed.
        self.kept = KeptVm(keeper)
        #: Where it is in its life, and what went wrong.
        self.life = Life(self.kept)
        self._on_change = on_change
        #: What its channels are connected to. Guarded by the registry's lock.
        self.peers: set[Peer] = set()
        self._live = live
        self._sessions = Sessions(container_id, self.life, self.kept, space, live)
        # The thread that says hello sets these once; the pump thread drops _pump at its end.
        self._boot: Boot | None = None
        #: The control channel, for `status`; None before the VM is up.
        self.control: ControlLink | None = None
        self._channels: Channels | None = None  # what the pump closes
        self._pump: Pump | None = None

    # Between two processes --------------------------------------------------------------------------------

    def rest(self) -> None:
        """Have clients' threads raise `Resting`. Call it again if a hello may just have begun."""
        for part in (self._boot, self.control):
            if part:
                part.rest()

    def rest_pump(self) -> None:
        """Have the pump's thread end after its current turn, and close nothing."""
        if pump := self._pump:
            pump.rest()

    def hand_over(self) -> VmState:
        """Give up everything as a value, for `restore`. Nobody may use it any more."""
        starting, pump = self.life.state is State.STARTING, self._pump
        channel = pump.hand_over() if pump else None
        control, console = self._channels.hand_over() if channel and self._channels else (None, None)
        return VmState(
            container_id=self.container_id,
            owner=self.owner,
            age=time.monotonic() - self.created,
            life=self.life.hand_over(self.life.state if channel or starting else State.GONE),
            next_seq=self.life.next_seq,
            peers=sorted(self.peers),
            boot=self._boot.hand_over() if starting and self._boot else None,
            control=control,
            console=console,
            channel=channel,
        )

    def restore(self, state: VmState, users: Users) -> None:
        """Go on where the VM in the previous process stood. Call it before any other thread knows the VM.

        Raises `OSError`.
        """
        self.created = time.monotonic() - state.age
        self.life.restore(state.life)
        self.life.next_seq = state.next_seq
        if state.boot:
            self._boot = self._new_boot()
            self._boot.restore(state.boot)
        if not state.boot or state.boot.io:  # else it dials, and claims its peers, once more
            self.peers = set(state.peers)
        if channel := state.channel:
            channels = Channels.from_state(
                self.container_id, channel.io, state.control, state.console, self._answered
            )
            self._pump = self._make_pump(channels, users.of(self.owner))
            if state.control:
                # Not earlier: when the VM began to be kept, none of the questions could have been sent.
                channels.control.find_out()
            sessions = [self._sessions.restore(each, users.of(each.uid)) for each in channel.streams.sessions]
            self._pump.restore(channel, sessions)

    def go_on(self) -> None:
        """Start the thread of a pump that has been restored."""
        pump = self._pump
        if pump:
            try:
                pump.start()
            except RuntimeError as error:
                self.lose(f"the daemon is short of resources: {error}")
                self.ended()

    # A client's thread ------------------------------------------------------------------------------------

    def start(
        self, hello: Hello, dialer: Dialer, user: User, is_here: Callable[[], bool] = lambda: True
    ) -> None:
        """Connect to the VM and wait until it is ready, as long as `is_here` says that the client waits too.

        Raises `VmError`; nothing is left open then. Or raises `Resting`; then `hand_over` gives up what it
        has so far.
        """
        self._boot = boot = self._boot or self._new_boot()
        try:
            channels, self.life.next_seq = boot.run(hello, dialer, is_here)
            with contextlib.ExitStack() as undo:
                undo.callback(channels.close)
                self._pump = pump = self._make_pump(channels, user)
                undo.pop_all()
            pump.start()
            if not self._move(State.UP):
                raise VmError(self.life.why_gone)
        except Resting:
            raise
        except BaseException as error:
            self.life.fail(str(error))
            self.abort()
            self._move(State.GONE)
            if isinstance(error, OSError | RuntimeError):
                raise VmError(f"the daemon is short of resources: {error}") from None
            raise

    def _new_boot(self) -> Boot:
        return Boot(self.container_id, self._live.current.vm)

    def _make_pump(self, channels: Channels, user: User) -> Pump:
        """Return the VM's pump, not yet started. Raises `OSError`; the caller keeps the channels then."""
        control, io, console = channels.control, channels.io, channels.console
        self._channels, self.control = channels, control
        fds = Fd(control.fd), Fd(io.fileno()), Fd(console.fileno()) if console else None
        facts = Facts(self.container_id, self.owner, self.created)
        memory = self.kept.begin(facts, sorted(self.peers), fds)
        self.life.note_all()
        control.keep(self.kept.control)
        pacing = Pacing(self._live.current.stdin.echo_timeout, control.acknowledge)
        return Pump(self, Sockets(io, control, console), memory, user.one_batch, pacing)

    def command(self, name: Code, payload: bytes, client: int = 0) -> ControlMessage:
        """Have the agent carry out a command; returns its ACK. Raises `VmError`.

        If it raises `Resting`, the same `client` has to ask for it again.
        """
        length = HEADER.size + len(payload)
        if length > MAX_COMMAND:
            raise VmError(f"message too long {length}")
        control, pump = self.control, self._pump
        if control is None or not self.life.can_be_used:
            raise VmError(self.life.why_gone)
        starts = stdio_seqs(payload) if name in STARTS else []
        if pump and starts:
            self.kept.note_processes(starts, PROCESS_COMMANDED)
            pump.expect_processes(starts)
        if name is Code.DESTROY_POD and not control.is_waited_for_by(client):
            self.life.expect_end()
        answer = self._transact(control, Asked(name, starts, self._answered), payload, client)
        if answer.code == Code.ERROR:
            said = answer.payload.decode(errors="replace")
            refusal = "ERROR received from Hyperstart" + (f": {said}" if said else "")
            self.life.trouble = Trouble(f"{name.hyper_name}: {refusal}", time.monotonic())
            raise VmError(refusal)
        return answer

    def _transact(self, control: ControlLink, asked: Asked, payload: bytes, client: int) -> ControlMessage:
        name = asked.code
        try:
            return control.transact(asked, payload, self._live.current.vm.command_timeout, client)
        except Resting:
            raise
        except NoAnswer as error:
            if isinstance(error, NotSent) and name is Code.DESTROY_POD:
                self.life.expect_end(-1)
            fields = {"vm": self.container_id, "command": name.hyper_name, "error": str(error)}
            logger.warning("command not answered", extra=fields)
            self.life.trouble = Trouble(f"{name.hyper_name}: {error}", time.monotonic())
            raise VmError(str(error)) from None
        except ControlLost as lost:
            self.lose(str(lost))
            raise VmError(self.life.why_gone) from None
        except Exception:  # the channel is in an unknown state now
            faults.note("control channel failed", vm=self.container_id, command=name.hyper_name)
            self.lose("internal error in its control channel")
            raise VmError(self.life.why_gone) from None

    def _answered(self, name: Code, starts: Sequence[int], answer: ControlMessage) -> None:
        """A client's command was answered, however late. The thread that reads the answer calls this."""
        if name is Code.DESTROY_POD and answer.code == Code.ERROR:
            self.life.expect_end(-1)
        if starts and answer.code == Code.ACK:
            self.kept.note_processes(starts, PROCESS_STARTED)
            if pump := self._pump:
                pump.open_stdin(starts)

    def open_session(self, n_streams: int, user: User, pid: int = 0) -> tuple[int, socket.socket]:
        """Allocate streams for the client process `pid` of a user.

        Returns the first seq, and the client's end of the streams' fd. Raises `VmError` or `LimitReached`; no
        seq is used up then.
        """
        pump = self._pump
        if pump is None or not self.life.can_be_used:
            raise VmError(self.life.why_gone)
        return self._sessions.open(n_streams, user, pid, pump.add)

    # Pump thread ------------------------------------------------------------------------------------------

    def ended(self) -> None:
        """The pump has delivered everything and closed both channels."""
        self._move(State.GONE)
        self._pump = None  # or a client that stays attached would keep the pump's buffers

    # Any thread -------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """A client has said bye. End when the VM hangs up, or at the end of the linger."""
        if self._move(State.LEAVING) and (pump := self._pump):
            pump.finish("it has lingered long enough after bye", self._live.current.vm.bye_linger)

    def lose(self, cause: str) -> None:
        """The VM is lost because of `cause`. Threads that wait for its answers find its channel lost."""
        expected = self.life.lose(cause)
        if expected is None:
            return
        self._on_change(self, State.LOST)
        if expected:
            logger.info("VM gone", extra={"vm": self.container_id, "reason": cause})
        else:
            logger.warning("VM lost", extra={"vm": self.container_id, "error": cause})
        if self.control:
            self.control.hang_up()

    def describe(self) -> Future[Streams] | None:
        """Ask for the state of its streams (`Pump.describe`); None while it has no pump."""
        pump = self._pump
        return pump.describe() if pump else None

    def stop(self) -> None:
        """Deliver what the VM has sent by now, and end, because the daemon stops."""
        pump, boot = self._pump, self._boot
        self.life.expect_end()
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
        is_well = pump is None or pump.probe()
        self.life.note_health(is_well=is_well)
        return is_well

    def _move(self, to: State) -> bool:
        """Move to another state if that is legal; returns whether it was."""
        if moved := self.life.move(to):
            self._on_change(self, to)
        return moved
