"""One process in a container, from its start to its end, with this command's standard streams as its own."""

import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass

import msgspec

from cc_proxy.api import Client, Refused
from cc_proxy.ctl.background import BackgroundCommands, SignalWatch
from cc_proxy.ctl.errors import STATUS_NOT_STARTED, Failure, Interrupted, is_from_agent
from cc_proxy.ctl.options import Process
from cc_proxy.ctl.relay import IoFd, loop
from cc_proxy.ctl.requests import HyperProcess, KillContainer, WinSize, hyper_process
from cc_proxy.ctl.signals import Signals
from cc_proxy.ctl.stdio import STDIN_FD, Output, Stdin
from cc_proxy.ctl.streams import ProcessStreams, stdin_frames
from cc_proxy.ctl.terminal import Terminal

#: Makes the name and the arguments of the command that starts a process.
StartCommand = Callable[[HyperProcess], tuple[str, msgspec.Struct]]


#: Signals that ask for an end.
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM})


def terminal_for(process: Process) -> Terminal | None:
    """Return the terminal for a process that wants one. Raises `Misuse` if stdin is none."""
    return Terminal(STDIN_FD) if process.terminal else None


@dataclass(frozen=True)
class Attendance:
    """Stands in for a process: what comes to this command goes to it, and the other way round."""

    client: Client
    signals: Signals
    container_id: str
    process: Process
    terminal: Terminal | None
    #: Whether signals are passed on. They reach a container's first process, so only that may have them.
    passes_signals: bool

    def run(self, command: StartCommand) -> int:
        """Start the process and return its exit status.

        Raises `Failure`, `ProxyError` or `OSError` if that cannot be had, `Interrupted` if a signal or a
        closed stdout ends this command first. `client` is of no use for other requests afterwards.
        """
        with self.signals.may_interrupt():
            io_base, fd = self.client.allocate_io(1 if self.terminal else 2)
        with socket.socket(fileno=fd) as io:
            self._start(command, io_base)
            with self._raw_terminal():
                return self._relay(io, io_base)

    def _start(self, command: StartCommand, io_base: int) -> None:
        """Have the process started. The first signal is the process's, as soon as it is there."""
        size = self.terminal.size() if self.terminal else None
        name, arguments = command(hyper_process(self.process, io_base, size))
        try:
            with self.signals.may_interrupt(tolerate=1):
                self.client.hyper(name, arguments)
        except Refused as refusal:
            if not is_from_agent(refusal):
                raise
            raise Failure(f"cannot start '{self.process.args[0]}': {refusal}", STATUS_NOT_STARTED) from None

    def _raw_terminal(self) -> AbstractContextManager[None]:
        if self.terminal is None:
            return nullcontext()
        return self.terminal.raw(keys_are_signals=not self.process.interactive)

    def _relay(self, io: socket.socket, io_base: int) -> int:
        streams, output = ProcessStreams(io_base), Output()
        stdin = Stdin(io_base, forward=self.process.interactive, terminal=self.process.terminal)
        io_fd = IoFd(io, streams, stdin, output)
        passed: set[int] = set()

        def passes(signum: int) -> bool:
            """Whether a signal is the process's. A second that ends is not if nobody reads its output."""
            again = output.stalled and signum in _ENDING and not passed.isdisjoint(_ENDING)
            return self.passes_signals and streams.status is None and not again

        def react(signum: int) -> None:
            if signum == signal.SIGWINCH:
                self._resize(commands, io_base)
            elif passes(signum):
                passed.add(signum)
                commands.send("killcontainer", KillContainer(self.container_id, signum))
            else:
                raise Interrupted(signum)

        def done() -> bool:
            return not output.size and (io_fd.at_eof or streams.status is not None)

        with closing(BackgroundCommands(self.client)) as commands:
            # It may have changed since the process was described.
            self._resize(commands, io_base)
            try:
                loop((SignalWatch(self.signals, react), commands, io_fd, stdin, output), done)
            except Interrupted:
                _end_stdin(io, io_fd, io_base)
                raise
        if streams.status is None:
            raise Failure(f"the VM or cc-proxy went away before '{self.process.args[0]}' had ended")
        return streams.status

    def _resize(self, commands: BackgroundCommands, io_base: int) -> None:
        size = self.terminal.size() if self.terminal else None
        if size and (size.rows or size.columns):
            commands.send("winsize", WinSize(io_base, size.rows, size.columns))


def _end_stdin(io: socket.socket, io_fd: IoFd, io_base: int) -> None:
    """Have the process find its input at its end. The proxy sees to that only if there was any."""
    if not io_fd.has_sent:
        with suppress(OSError):
            io.send(stdin_frames(io_base, b""), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
