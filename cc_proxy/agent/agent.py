"""The embedded agent: what a VM is to the host, behind its two serial ports."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from cc_proxy.agent.control import CommandServer
from cc_proxy.agent.iochannel import IoChannel
from cc_proxy.agent.loop import Loop, Turn
from cc_proxy.agent.machine import ThisMachine
from cc_proxy.agent.orphans import Orphans
from cc_proxy.agent.pod import Pod
from cc_proxy.agent.ports import Port
from cc_proxy.agent.processes import Processes
from cc_proxy.agent.quirks import NO_QUIRKS, Quirks
from cc_proxy.agent.socketport import SocketPort

#: Seconds that a host gets to read what it was sent before the power goes off.
_LAST_READ = 1.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an agent runs on: its ports, its machine, and its process."""

    #: Makes the port at a path, which the loop serves in this turn of its rounds. Raises `CannotListen`.
    port: Callable[[Loop, str, Turn], Port] = SocketPort
    machine: ThisMachine = field(default_factory=ThisMachine)
    #: None if this process has children besides the agent's.
    orphans: Orphans | None = None
    #: Called with the reason before a command is answered with ERROR.
    on_refused: Callable[[str], None] = lambda _reason: None


class Agent:
    """Stands in for a VM behind the two AF_UNIX sockets of its hypervisor, or serves a real VM's two ports.

    Hosts can connect as soon as it is made; they are served while `serve` runs. `close` removes the sockets:
    use the agent as a context manager. Raises `CannotListen` if it cannot have a port.

    Like the real agent, it silently drops stdin that does not fit. With `lossless` it drops none
    (`IoChannel`), and reports the end of a process even while others put out data.

    It is meant to run in the only thread of a process of its own (`run_agent`). It works among other threads,
    too. But then there must be no `Surroundings.orphans`, and processes with a terminal, a user or limits run
    Python code between fork and exec, which is never quite safe among threads.
    """

    def __init__(
        self,
        ctl: str | os.PathLike[str],
        io: str | os.PathLike[str],
        quirks: Quirks = NO_QUIRKS,
        *,
        lossless: bool = False,
        surroundings: Surroundings | None = None,
    ) -> None:
        surroundings = surroundings or Surroundings()
        self._quirks = quirks
        self._orphans = surroundings.orphans
        self._processes = Processes()
        with ExitStack() as made:
            self._loop = Loop()
            made.callback(self._loop.close)
            self._ctl = surroundings.port(self._loop, os.fspath(ctl), Turn.COMMANDS)
            made.callback(self._ctl.close)
            self._io = surroundings.port(self._loop, os.fspath(io), Turn.FRAMES)
            made.callback(self._io.close)
            self._made = made.pop_all()
        self._channel = IoChannel(self._io, self._processes, quirks, lossless=lossless)
        self._pod = Pod(self._loop, self._channel, self._processes, surroundings.machine, quirks)
        self._server = CommandServer(self._ctl, self._pod, quirks, self._power_off, surroundings.on_refused)
        self._loop.on_wake = self._reap

    # Any thread, and signal handlers -----------------------------------------------------------------

    def stop(self) -> None:
        """Have `serve` return soon, as if the VM's plug was pulled. Must not be called after `close`."""
        self._loop.stop()

    @property
    def wakeup_fd(self) -> int:
        """For `signal.set_wakeup_fd`, so that every signal interrupts the wait for events.

        Each write to it also reaps orphans. So SIGCHLD needs a Python handler, if only an empty one.
        """
        return self._loop.wakeup_fd

    # One thread --------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Be a VM until it powers off or `stop` is called; then end all processes and hang up.

        Raises `Panic` where the real agent would crash, after the same cleanup. Can be called once.
        """
        try:
            self._ctl.serve(self._server)
            self._io.serve(self._channel)
            if not self._quirks.never_ready:
                self._loop.call_later(self._quirks.ready_delay, self._boot)
            self._loop.run()
        finally:
            self._end()

    def close(self) -> None:
        """End all processes, hang up, and remove the sockets, even if `serve` was never called."""
        self._end()
        self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _boot(self) -> None:
        self._server.boot()
        self._io.set_reading(True)

    def _power_off(self) -> None:
        """End once the host has read what it was sent, or has had the time to."""
        self._loop.call_later(_LAST_READ, self._loop.stop)
        self._ctl.when_drained(lambda: self._io.when_drained(self._loop.stop))

    def _reap(self) -> None:
        if self._orphans is not None:
            self._orphans.reap({process.pid for process in self._processes})

    def _end(self) -> None:
        self._pod.kill()
        if self._orphans is not None:
            self._orphans.kill()
        self._ctl.close()
        self._io.close()
