"""A process in a container, attached to this command's standard streams from its start to its end."""

import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import msgspec

from cc_proxy.api import Client, Refused
from cc_proxy.ctl.agentlog import AgentLog
from cc_proxy.ctl.background import BackgroundCommands, SignalWatch
from cc_proxy.ctl.connection import lost_streams
from cc_proxy.ctl.errors import (
    STATUS_NOT_STARTED,
    STATUS_SIGNALLED,
    Failure,
    Interrupted,
    is_from_agent,
    says_why,
)
from cc_proxy.ctl.options import ProcessOptions, ProxyOptions
from cc_proxy.ctl.relay import IoFd, loop
from cc_proxy.ctl.requests import HyperProcess, KillContainer, WinSize, hyper_process
from cc_proxy.ctl.signals import STOPPING, Signals
from cc_proxy.ctl.stdio import STDIN_FD, OutputWriter, StdinSource
from cc_proxy.ctl.streams import ProcessStreams
from cc_proxy.ctl.terminal import Terminal

#: Returns the name and the arguments of the command that starts a process.
StartCommand = Callable[[HyperProcess], tuple[str, msgspec.Struct]]


#: A process that ends within this many seconds after a signal is assumed to have been killed by it.
_KILLED_WITHIN = 5.0
_NOT_STARTED = "the agent does not say why: look whether the program, -w's directory and -u's user are there"


def terminal_for(process: ProcessOptions) -> Terminal | None:
    """Return the terminal for a process that wants one. Raises `Misuse` if stdin is no terminal."""
    return Terminal(STDIN_FD) if process.terminal else None


@dataclass(frozen=True)
class Attendance:
    """Stands in for a process: passes this command's stdin to it, and its output to this command's stdout."""

    client: Client
    signals: Signals
    proxy: ProxyOptions
    container_id: str
    process: ProcessOptions
    terminal: Terminal | None

    def run(self, command: StartCommand, *, passes_signals: bool) -> int:
        """Start the process and return its exit status.

        With `passes_signals`, signals are passed on. The agent delivers them to the container's first
        process, so set it only for that one.

        Raises `Failure`, `ProxyError` or `OSError` if the process cannot be started or its status is not
        known; `Interrupted` if a signal or a closed stdout ends this command first. `client` must make no
        other requests afterwards.
        """
        began = time.monotonic()
        with self.signals.may_interrupt():
            io_base, fd = self.client.allocate_io(1 if self.terminal else 2)
        with socket.socket(fileno=fd) as io:
            self._start(command, io_base)
            with self._raw_terminal():
                status = self._relay(io, io_base, passes_signals)
        if status is None:
            raise lost_streams(self.proxy, self.container_id, self.process.args[0], began)
        return status

    def _start(self, command: StartCommand, io_base: int) -> None:
        """Have the agent start the process. The first signal does not interrupt: it is for the process."""
        size = self.terminal.size() if self.terminal else None
        name, arguments = command(hyper_process(self.process, io_base, size))
        log = AgentLog(self.container_id)
        try:
            with self.signals.may_interrupt(tolerate=1):
                self.client.hyper(name, arguments)
        except Refused as refusal:
            if not is_from_agent(refusal):
                raise
            hint = "" if says_why(refusal) else log.reason(name) or _NOT_STARTED
            text = f"cannot start '{self.process.args[0]}': {refusal}"
            raise Failure(text, STATUS_NOT_STARTED, hint) from None

    def _raw_terminal(self) -> AbstractContextManager[None]:
        if self.terminal is None:
            return nullcontext()
        return self.terminal.raw(keys_are_signals=not self.process.interactive)

    def _relay(self, io: socket.socket, io_base: int, passes_signals: bool) -> int | None:
        """Carry the streams until the process ends; returns its status, or None if the streams end first."""
        streams, passed_on = ProcessStreams(io_base), _PassedOn()
        stdin = StdinSource(io_base, forward=self.process.interactive, terminal=self.process.terminal)
        with closing(BackgroundCommands(self.client)) as commands, closing(OutputWriter()) as output:
            io_fd = IoFd(io, streams, stdin, output)

            def passes(signum: int) -> bool:
                """Whether to pass a signal on instead of ending this command.

                While nobody reads the output, the process may be unable to end, so only the first signal to
                stop is passed on.
                """
                again = output.stalled and signum in STOPPING and passed_on.any_stopping
                insists = again or self.signals.insistent
                return passes_signals and streams.status is None and not insists

            def react(signum: int) -> None:
                if signum == signal.SIGWINCH:
                    self._resize(commands, io_base)
                elif passes(signum):
                    passed_on.add(signum)
                    commands.send(signum, "killcontainer", KillContainer(self.container_id, signum))
                else:
                    raise Interrupted(signum)

            def done() -> bool:
                if streams.status is not None:
                    passed_on.end()
                return not output.size and (io_fd.at_eof or streams.status is not None)

            # The window may have changed since the process was described.
            self._resize(commands, io_base)
            try:
                loop((SignalWatch(self.signals, react), commands, io_fd, stdin, output), done)
            finally:
                if streams.status is None:
                    stdin.end()
                    io_fd.send()
        return None if streams.status is None else passed_on.status(streams.status)

    def _resize(self, commands: BackgroundCommands, io_base: int) -> None:
        size = self.terminal.size() if self.terminal else None
        if size and (size.rows or size.columns):
            commands.send(signal.SIGWINCH, "winsize", WinSize(io_base, size.rows, size.columns))


class _PassedOn:
    """The signals that were passed on to a process, to tell whether one of them has killed it.

    For a process that a signal killed, the agent reports the status 0.
    """

    def __init__(self) -> None:
        self._signals: dict[int, float] = {}  # when each was sent, the latest last
        self._ended: float | None = None

    @property
    def any_stopping(self) -> bool:
        """Whether one of them was SIGINT or SIGTERM."""
        return not STOPPING.isdisjoint(self._signals)

    def add(self, signum: int) -> None:
        """Note that a signal is passed on."""
        self._signals.pop(signum, None)
        self._signals[signum] = time.monotonic()

    def end(self) -> None:
        """Note that the process has ended; only the first call counts."""
        self._ended = self._ended or time.monotonic()

    def status(self, reported: int) -> int:
        """Return the exit status of a process for which the agent has reported `reported`."""
        if reported or self._ended is None:
            return reported
        recent = [signum for signum, at in self._signals.items() if self._ended - at <= _KILLED_WITHIN]
        return STATUS_SIGNALLED + recent[-1] if recent else reported
