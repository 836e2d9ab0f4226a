"""The pod: what runs in the VM, and what each command does to it."""

from __future__ import annotations

import os
import signal
import stat
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from cc_proxy.agent import commands
from cc_proxy.agent.commands import Command, ProcessSpec
from cc_proxy.agent.errors import CommandRefused, MissingBinary, Panic
from cc_proxy.agent.loop import Loop
from cc_proxy.agent.machine import ThisMachine
from cc_proxy.agent.process import FrameChannel, Process
from cc_proxy.agent.processes import Processes
from cc_proxy.agent.quirks import Quirks
from cc_proxy.agent.spawn import spawn
from cc_proxy.hyperstart.control import HEADER, MAX_MESSAGE

#: The answer to VERSION.
PROTOCOL_VERSION = 4242
#: The exit status of a process for a container that does not exist.
NO_CONTAINER = 125

_U32 = struct.Struct(">I")
_MAX_FILE = MAX_MESSAGE - HEADER.size


@dataclass(eq=False, slots=True)
class _Container:
    """A container lives as long as its first process does."""

    id: str
    #: Its root directory; None for the agent's.
    root: str | None
    first: Process | None = None
    #: The processes started in it afterwards.
    others: set[Process] = field(default_factory=set)


class Pod:
    """Carries out commands. At most one pod lives at a time; without one, nothing can be started.

    It keeps `processes` up to date: those that run.
    """

    def __init__(
        self, loop: Loop, channel: FrameChannel, processes: Processes, machine: ThisMachine, quirks: Quirks
    ) -> None:
        self._loop = loop
        self._channel = channel
        self._processes = processes
        self._machine = machine
        self._quirks = quirks
        self._alive = False
        self._containers: dict[str, _Container] = {}
        self._destroyed: Callable[[], None] | None = None
        #: Called when the last container is gone.
        self.on_finished: Callable[[], None] = lambda: None

    def carry_out(self, command: Command) -> bytes:
        """Carry out any command but `DestroyPod`; returns the payload of its ACK.

        Raises `CommandRefused` for an ERROR; nothing has changed then.
        """
        match command:
            case commands.StartPod():
                self._start(command)
            case commands.NewContainer():
                self._new_container(command)
            case commands.ExecCmd():
                self._exec(command)
            case commands.KillContainer():
                self._kill(command)
            case commands.WinSize():
                self._resize(command)
            case commands.ReadFile():
                return self._read_file(command)
            case commands.Version():
                self._channel.announce()  # hosts send VERSION when they find an agent that is up already
                return _U32.pack(PROTOCOL_VERSION)
        return b""

    def destroy(self, destroyed: Callable[[], None]) -> None:
        """Ask all processes to end, and call `destroyed` when all of them have, which may be never."""
        self._destroyed = destroyed
        _signal_all(self._processes, signal.SIGTERM)
        self._see_if_destroyed()

    def kill(self) -> None:
        """End all processes at once, and report none of them."""
        for process in list(self._processes):
            process.kill()
            self._processes.remove(process)

    # Commands ----------------------------------------------------------------------------------------

    def _start(self, command: commands.StartPod) -> None:
        if self._alive:
            raise CommandRefused("there is a pod already")
        if command.containers:
            raise CommandRefused("containers have to be started by newcontainer")
        self._machine.start_pod(command.hostname, command.share_dir)
        self._alive = True

    def _new_container(self, command: commands.NewContainer) -> None:
        self._check_alive()
        if command.id in self._containers:
            raise CommandRefused(f"there is a container {command.id} already")
        root = self._machine.make_root(command.image, command.rootfs, command.fsmap)
        container = _Container(command.id, root)
        try:
            container.first = self._run(command.process, container)
        except CommandRefused as error:
            self._machine.remove_root(container.root)
            if isinstance(error, MissingBinary) and self._quirks.panic_on_missing_binary:
                raise Panic(str(error)) from None
            raise
        self._containers[command.id] = container

    def _exec(self, command: commands.ExecCmd) -> None:
        self._check_alive()
        container = self._containers.get(command.container)
        if container is not None:
            container.others.add(self._run(command.process, container))
        else:
            # The ACK comes first.
            self._loop.call_later(0, lambda: self._report(command.process.stdio, NO_CONTAINER))

    def _kill(self, command: commands.KillContainer) -> None:
        container = self._container(command.container)
        if container.first is not None:
            container.first.signal(command.signal, group=command.all_processes)
        if command.all_processes:
            for process in container.others:
                process.signal(command.signal, group=True)

    def _resize(self, command: commands.WinSize) -> None:
        process = self._processes.owner(command.seq)
        if process is not None:
            process.resize(command.row, command.column)

    def _read_file(self, command: commands.ReadFile) -> bytes:
        root = self._container(command.container).root
        try:
            return _content(os.path.join(root or "/", command.file.lstrip("/")))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CommandRefused(f"{command.file}: {reason}") from None

    # Processes ---------------------------------------------------------------------------------------

    def _run(self, spec: ProcessSpec, container: _Container) -> Process:
        def gone(process: Process) -> None:
            self._process_gone(process, container)

        process = Process(self._loop, self._channel, spec.stdio, spawn(spec, container.root), gone)
        self._processes.add(process)
        return process

    def _process_gone(self, process: Process, container: _Container) -> None:
        self._processes.remove(process)
        container.others.discard(process)
        if process is container.first:
            self._container_gone(container)
        self._see_if_destroyed()

    def _container_gone(self, container: _Container) -> None:
        del self._containers[container.id]
        self._machine.remove_root(container.root)
        if self._destroyed is None:
            # Nothing outlives the first process of a PID namespace.
            _signal_all(container.others, signal.SIGKILL)
        if not self._containers:
            self._alive = False
            self._machine.end_pod()
            self.on_finished()

    def _report(self, seq: int, status: int) -> None:
        """Report the end of a process that never ran."""
        if not self._channel.send_end(seq, status):
            self._channel.when_drained(lambda: self._report(seq, status))

    def _see_if_destroyed(self) -> None:
        if self._destroyed is not None and not self._processes:
            self._channel.flush()  # the host learns of the ends before the answer
            self._destroyed()

    # Checks ------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if not self._alive:
            raise CommandRefused("there is no pod")

    def _container(self, name: str) -> _Container:
        if name not in self._containers:
            raise CommandRefused(f"no container {name}")
        return self._containers[name]


def _signal_all(processes: Iterable[Process], number: int) -> None:
    """Send a signal to the process groups of processes, as far as that is permitted."""
    for process in processes:
        with suppress(CommandRefused):
            process.signal(number, group=True)


def _content(path: str) -> bytes:
    """Return a regular file's content: reading any other file could block. Raises `OSError`, `ValueError`."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        content = file.read(_MAX_FILE + 1)
    if len(content) > _MAX_FILE:
        raise ValueError("too long for an answer")
    return content
