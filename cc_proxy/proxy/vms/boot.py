"""Connecting to a VM, and waiting until its agent is ready."""

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.payloads import Hello
from cc_proxy.continuity.state.vms import BootState, ConsoleState, ControlState
from cc_proxy.hyperstart.control import ControlMessage
from cc_proxy.linux.fds import Fd, close_stream, hung_up_socket
from cc_proxy.log.levels import logger
from cc_proxy.proxy.rest import Resting
from cc_proxy.proxy.vms.commands import OnAnswered
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink, NoAnswer
from cc_proxy.proxy.vms.control_socket import ControlLost
from cc_proxy.proxy.vms.dialer import CannotConnect, Dialer
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.settings import VmSettings

#: poll(2) reports a socket as writable once three quarters of this are free. The last quarter keeps the VM
#: busy until more is sent.
_SEND_BUFFER = 1024 * 1024


@dataclass(slots=True)
class Channels:
    """The open channels of a VM. Their holder closes them."""

    control: ControlLink
    io: socket.socket
    #: None if there is none, or the log does not take its lines.
    console: Console | None

    @classmethod
    def from_state(
        cls,
        vm: str,
        io: Fd | None,
        control: ControlState | None,
        console: ConsoleState | None,
        on_answered: OnAnswered = lambda *_: None,
    ) -> Self:
        """Return the channels that another process had open. Raises `OSError`.

        `on_answered` is called when a command that it sent is answered.
        """
        # A socket that has hung up stands for one that was closed already.
        if control:
            link = ControlLink.from_state(control, event_logger(vm), on_answered)
        else:
            link = ControlLink(hung_up_socket(), event_logger(vm))
        return cls(
            link,
            socket.socket(fileno=io.number) if io else hung_up_socket(),
            Console.from_state(vm, console) if console else None,
        )

    def hand_over(self) -> tuple[ControlState | None, ConsoleState | None]:
        """Give up all but the I/O channel as values, for `from_state`; None for what is closed."""
        return self.control.hand_over(), self.console.hand_over() if self.console else None

    def close(self) -> None:
        """Close all. A thread that uses the control channel finds it lost."""
        self.control.close()
        close_stream(self.io)
        if self.console:
            self.console.close()


class Boot:
    """One attempt to connect to a VM and see it ready. One thread, except for `rest` and `give_up`."""

    def __init__(self, vm: str, limits: VmSettings) -> None:
        self._vm = vm
        self._limits = limits
        self._given_up = ""  # why; set once, by any thread
        self._resting = False
        self._channels: Channels | None = None  # once they are connected
        self._deadline = Deadline(limits.ready_timeout)
        self._quiz_at = self._deadline  # set once they are connected

    # Between two processes --------------------------------------------------------------------------------

    def rest(self) -> None:
        """Have `run` raise `Resting`, so that `hand_over` can give up what it has so far. Any thread."""
        self._resting = True
        if channels := self._channels:
            channels.control.rest()

    def hand_over(self) -> BootState:
        """Give up what is open as a value. Call it after `run` has raised `Resting`."""
        channels = self._channels
        control, console = channels.hand_over() if channels else (None, None)
        return BootState(
            left=self._deadline.remaining(),
            quizzed_in=self._quiz_at.remaining(),
            io=Fd(channels.io.detach()) if channels else None,
            control=control,
            console=console,
        )

    def restore(self, state: BootState) -> None:
        """Go on where another boot of this VM stood. Call it before `run`. Raises `OSError`."""
        self._deadline, self._quiz_at = Deadline(state.left), Deadline(state.quizzed_in)
        if state.io:
            self._channels = Channels.from_state(self._vm, state.io, state.control, state.console)

    # Any thread -------------------------------------------------------------------------------------------

    def give_up(self, cause: str) -> None:
        """Make `run` fail soon, with this cause."""
        self._given_up = cause
        if channels := self._channels:
            channels.control.hang_up(cause)

    # One thread -------------------------------------------------------------------------------------------

    def run(self, hello: Hello, dialer: Dialer, is_here: Callable[[], bool]) -> tuple[Channels, int]:
        """Connect all channels, and wait until the agent is ready, within one deadline.

        Returns the channels, and the first seq to hand out. Ends early if `is_here` says that the client has
        gone. Raises `VmError`, or `OSError` or `RuntimeError` if the daemon lacks resources; nothing is left
        open then. Raises `Resting`, and then `hand_over` has what is open.
        """

        def is_wanted() -> bool:
            if self._resting:
                raise Resting
            return not self._given_up and is_here()

        channels = self._channels
        try:
            if channels is None:
                channels = self._channels = self._connect(hello, dialer, is_wanted)
            booted = self._wait_until_up(channels, is_wanted)
        except Resting:
            raise
        except BaseException:
            if channels:
                channels.close()
            raise
        if channels.console and not Console.is_logged():
            channels.console.close()
            channels.console = None
        return channels, 1 if booted else _unused_seq()

    def _connect(self, hello: Hello, dialer: Dialer, is_wanted: Callable[[], bool]) -> Channels:
        try:
            sockets = dialer.connect(hello, self._deadline, still_wanted=is_wanted)
        except CannotConnect as error:
            raise VmError(self._given_up or str(error)) from None
        with contextlib.ExitStack() as undo:
            undo.enter_context(sockets)
            self._quiz_at = Deadline(self._limits.ready_ping_after)
            for channel in (sockets.ctl, sockets.io):
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            console = Console.open(self._vm, hello.console, sockets)
            control = ControlLink(sockets.ctl, event_logger(self._vm))
            undo.pop_all()
        return Channels(control, sockets.io, console)

    def _wait_until_up(self, channels: Channels, is_wanted: Callable[[], bool]) -> bool:
        """Wait for the agent; returns whether it said READY. An error quotes the console's last lines."""
        left, quiz_in, console = self._deadline.remaining(), self._quiz_at.remaining(), channels.console
        try:
            return channels.control.wait_until_up(channels.io, left, quiz_in, console, is_wanted)
        except NoAnswer as error:
            cause = f"{error} in {self._limits.ready_timeout:g} s"
        except ControlLost as error:
            cause = self._given_up or str(error)
        lines = console.last_lines() if console else ""
        raise VmError(f"{cause}; the console's last lines: {lines}" if lines else cause)


def event_logger(vm: str) -> Callable[[ControlMessage], None]:
    """Return a function that logs an event of a VM's agent."""

    def log(event: ControlMessage) -> None:
        if logger.isEnabledFor(logging.DEBUG):  # an agent sends two of them for each command
            logger.debug("event from the VM", extra={"vm": vm, "event": str(event)})

    return log


def _unused_seq() -> int:
    """Return a seq that no earlier daemon can have handed out, for a VM that was up already.

    To get this far, it would have had to hand out a million seqs a second. Below 2^53 until the year 2242.
    """
    return int(time.time()) << 20  # noqa: TID251 - the one clock that goes on over restarts of the daemon
