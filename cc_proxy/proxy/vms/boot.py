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
from cc_proxy.hyperstart.control import ControlMessage
from cc_proxy.log.levels import logger
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink, ControlLost, NoAnswer
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
        self.io.close()
        if self.console:
            self.console.close()


class Boot:
    """One attempt to connect to a VM and see it ready. One thread, except for `give_up`."""

    def __init__(self, hello: Hello, limits: VmSettings) -> None:
        self._hello = hello
        self._vm = hello.container_id
        self._limits = limits
        self._given_up = ""  # why; set once, by any thread
        self._control: ControlLink | None = None

    def run(self, dialer: Dialer) -> Ready:
        """Connect all sockets, and wait until the agent is ready, within one deadline.

        Raises `NotReady`, or `OSError` or `RuntimeError` if the daemon lacks resources; nothing is left open
        then.
        """
        deadline = Deadline(self._limits.ready_timeout)
        with contextlib.ExitStack() as undo:
            sockets = undo.enter_context(self._dial(dialer, deadline))
            self._control = control = ControlLink(sockets.ctl, self._note_event)
            undo.callback(control.close)
            console = Console.open(self._vm, self._hello.console, sockets)
            for channel in (sockets.ctl, sockets.io):
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            booted = self._wait_until_up(sockets.io, console, deadline, dialer.is_here)
            if console and not Console.is_logged():
                console.close()
                console = None
            undo.pop_all()
        return Ready(control, sockets.io, console, 1 if booted else _unused_seq())

    def give_up(self, cause: str) -> None:
        """Make `run` fail soon, with this cause. Any thread."""
        self._given_up = cause
        if self._control:
            self._control.hang_up(cause)

    def _dial(self, dialer: Dialer, deadline: Deadline) -> Connected:
        try:
            return dialer.connect(self._hello, deadline, still_wanted=lambda: not self._given_up)
        except CannotConnect as error:
            raise NotReady(self._given_up or str(error)) from None

    def _wait_until_up(
        self, io: socket.socket, console: Console | None, deadline: Deadline, is_here: Callable[[], bool]
    ) -> bool:
        """Wait for the agent; returns whether it said READY. An error has the console's last lines."""
        assert self._control
        limits = self._limits
        if self._given_up:  # when there was no channel yet that `give_up` could hang up
            raise NotReady(self._given_up)
        try:
            return self._control.wait_until_up(
                io, deadline.remaining(), limits.ready_ping_after, console, is_here
            )
        except NoAnswer as error:
            cause = f"{error} in {limits.ready_timeout:g} s"
        except ControlLost as error:
            cause = str(error)
        lines = console.last_lines() if console else ""
        raise NotReady(f"{cause}; the console's last lines: {lines}" if lines else cause)

    def _note_event(self, event: ControlMessage) -> None:
        if logger.isEnabledFor(logging.DEBUG):  # an agent sends two of them for each command
            logger.debug("event from the VM", extra={"vm": self._vm, "event": str(event)})


def _unused_seq() -> int:
    """Return a seq that no daemon can have handed out before, for a VM that was up already.

    That would take a million streams a second for as long as the VM lives. Below 2^53 until the year 2242.
    """
    return int(time.time()) << 20  # noqa: TID251 - the one clock that goes on over restarts of the daemon
