"""Connecting to a VM, and waiting until its agent is ready."""

import contextlib
import functools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.payloads import Hello
from cc_proxy.continuity.state.vms import BootState
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import ControlMessage, OnAnswer, ignore
from cc_proxy.linux.fds import Fd, close_stream
from cc_proxy.log.levels import logger
from cc_proxy.proxy.rest import Resting
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink, NoAnswer
from cc_proxy.proxy.vms.control_socket import ControlLost
from cc_proxy.proxy.vms.dialer import CannotConnect, Connected, Dialer
from cc_proxy.settings import VmSettings

#: poll(2) calls a socket writable when three quarters of this are free. The rest has to last until then.
_SEND_BUFFER = 1024 * 1024


class NotReady(Exception):
    """The VM cannot be reached, or its agent is not ready in time; the text is the cause."""


@dataclass(slots=True)
class Ready:
    """The sockets of a VM that is up, and their owner: a context manager that closes them. One thread."""

    control: ControlLink
    io: socket.socket
    #: None if there is none, or the log does not take its lines.
    console: Console | None
    #: The first seq to hand out.
    first_seq: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        close_stream(self.io)
        if self.console:
            self.console.close()


class Boot:
    """One attempt to connect to a VM and see it ready. One thread, except for `give_up`."""

    def __init__(self, hello: Hello, limits: VmSettings) -> None:
        self._hello = hello
        self._vm = hello.container_id
        self._note_event = functools.partial(note_event, self._vm)
        self._limits = limits
        self._given_up = ""  # why; set once, by any thread
        self._control: ControlLink | None = None
        self._io: socket.socket | None = None  # until it is ready; as is _console
        self._console: Console | None = None
        self._deadline = Deadline(limits.ready_timeout)
        self._quiz_at = self._deadline  # from when it is connected
        self._resting = False

    # Between two processes --------------------------------------------------------------------------------

    def rest(self) -> None:
        """Have `run` leave with `Resting`, and `hand_over` keep how far it has come. Any thread."""
        self._resting = True
        if self._control:
            self._control.rest()

    def hand_over(self) -> BootState:
        """Give up what is open as a value. After `run` has left."""
        return BootState(
            left=self._deadline.remaining(),
            quizzed_in=self._quiz_at.remaining(),
            io=Fd(self._io.detach()) if self._io else None,
            control=self._control.hand_over() if self._control else None,
            console=self._console.hand_over() if self._console else None,
        )

    def restore(self, state: BootState) -> None:
        """Go on where another one of this VM stood. Before `run`. Raises `OSError`."""
        self._deadline, self._quiz_at = Deadline(state.left), Deadline(state.quizzed_in)
        if state.io and state.control:
            self._io = socket.socket(fileno=state.io.number)
            self._control = ControlLink.from_state(state.control, self._note_event, _no_commands)
            self._console = Console.from_state(self._vm, state.console) if state.console else None

    # One thread, but for `give_up` ------------------------------------------------------------------------

    def run(self, dialer: Dialer) -> Ready:
        """Connect all sockets, and wait until the agent is ready, within one deadline.

        Raises `NotReady`, or `OSError` or `RuntimeError` if the daemon lacks resources; nothing is left open
        then. Raises `Resting`, and then `hand_over` has what is open.
        """
        with contextlib.ExitStack() as undo:
            control, io, console = self._connect(dialer, undo)
            try:
                booted = self._wait_until_up(control, io, console, dialer.is_here)
            except Resting:
                undo.pop_all()
                raise
            if console and not Console.is_logged():
                console.close()
                console = None
            undo.pop_all()
        self._io = self._console = None
        return Ready(control, io, console, 1 if booted else _unused_seq())

    def _connect(
        self, dialer: Dialer, undo: contextlib.ExitStack
    ) -> tuple[ControlLink, socket.socket, Console | None]:
        """Return what is open, or what has been restored; `undo` closes it."""
        if not self._control or not self._io:
            sockets = undo.enter_context(self._dial(dialer))
            self._control = ControlLink(sockets.ctl, self._note_event)
            undo.callback(self._control.close)  # before anything else can fail
            self._io, self._quiz_at = sockets.io, Deadline(self._limits.ready_ping_after)
            self._console = Console.open(self._vm, self._hello.console, sockets)
            for channel in (sockets.ctl, sockets.io):
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        undo.callback(self._io.close)
        if self._console:
            undo.callback(self._console.close)
        undo.callback(self._control.close)
        return self._control, self._io, self._console

    def give_up(self, cause: str) -> None:
        """Make `run` fail soon, with this cause. Any thread."""
        self._given_up = cause
        if self._control:
            self._control.hang_up(cause)

    def _dial(self, dialer: Dialer) -> Connected:
        try:
            return dialer.connect(self._hello, self._deadline, still_wanted=self._is_wanted)
        except CannotConnect as error:
            raise NotReady(self._given_up or str(error)) from None

    def _is_wanted(self) -> bool:
        if self._resting:
            raise Resting
        return not self._given_up

    def _wait_until_up(
        self,
        control: ControlLink,
        io: socket.socket,
        console: Console | None,
        is_here: Callable[[], bool],
    ) -> bool:
        """Wait for the agent; returns whether it said READY. An error has the console's last lines."""

        def still_waits() -> bool:
            if self._resting:
                raise Resting
            return is_here()

        if not self._is_wanted():  # when there was no channel yet that `give_up` could hang up
            raise NotReady(self._given_up)
        try:
            left, quiz_in = self._deadline.remaining(), self._quiz_at.remaining()
            return control.wait_until_up(io, left, quiz_in, console, still_waits)
        except NoAnswer as error:
            cause = f"{error} in {self._limits.ready_timeout:g} s"
        except ControlLost as error:
            cause = str(error)
        lines = console.last_lines() if console else ""
        raise NotReady(f"{cause}; the console's last lines: {lines}" if lines else cause)


def note_event(vm: str, event: ControlMessage) -> None:
    """Log an event of a VM's agent."""
    if logger.isEnabledFor(logging.DEBUG):  # an agent sends two of them for each command
        logger.debug("event from the VM", extra={"vm": vm, "event": str(event)})


def _no_commands(_code: Code, _seqs: Sequence[int]) -> OnAnswer:
    """None has been sent yet."""
    return ignore


def _unused_seq() -> int:
    """Return a seq that no daemon can have handed out before, for a VM that was up already.

    That would take a million streams a second for as long as the VM lives. Below 2^53 until the year 2242.
    """
    return int(time.time()) << 20  # noqa: TID251 - the one clock that goes on over restarts of the daemon
