"""A VM that has been started, and the process that owns its QEMU."""

import os
import select
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import BinaryIO

from cc_proxy.ctl.errors import STATUS_FAILED, Failure, Interrupted
from cc_proxy.ctl.options import VmSockets
from cc_proxy.ctl.signals import Signals
from cc_proxy.ctl.vm import keeper
from cc_proxy.ctl.vm.command import CONSOLE, CTL, IO, QMP, qemu_command
from cc_proxy.ctl.vm.directory import VmDirectory
from cc_proxy.ctl.vm.settings import QemuSettings
from cc_proxy.ctl.vm.words import first_complaint, last_words, panic

#: Seconds that the owner has to end: more than it gives QEMU.
_PATIENCE = 10.0
#: Seconds to wait after a failure to see whether the VM has ended.
_SOON = 1.0
#: The most bytes to read from a log: more than the console's has.
_MOST_READ = 256 * 1024


class Machine:
    """A VM that has been started. A process of its own (keeper.py) owns it.

    The caller must call `end`. One thread.
    """

    def __init__(self, directory: VmDirectory, settings: QemuSettings, accelerator: str) -> None:
        """Start the VM, which then waits for QMP's `cont`.

        `directory` is removed with the VM. Raises `Failure` or `OSError`; it is removed then, too.
        """
        self.sockets = VmSockets(*map(directory.socket_path, (CTL, IO, CONSOLE)))
        self.qmp_path = directory.socket_path(QMP)
        self._directory = directory
        self._is_kept = False
        with ExitStack() as undo:
            undo.callback(directory.remove)
            #: What the guest has said, or only the end of it.
            self._console = undo.enter_context(open(directory.log, "w+b", 0))
            #: What QEMU has said.
            self._errors = undo.enter_context(open(directory.errors, "w+b", 0))
            #: At end of file when the owner has ended. Closing it ends the owner, unless the VM is kept.
            self._life, owners_life = map(undo.enter_context, socket.socketpair())
            self._owner = _start_owner(directory, settings, accelerator, owners_life, self._errors)
            owners_life.close()
            undo.pop_all()

    def keep(self) -> None:
        """Let the VM run on after `end`."""
        self._life.send(b"\n")
        self._is_kept = True

    def end(self, signals: Signals) -> None:
        """End the VM and remove its directory, unless it is kept."""
        for each in (self._console, self._errors, self._life):
            each.close()
        if self._is_kept:
            self._owner.returncode = 0  # nobody waits for it
            return
        try:
            with signals.may_be_cut_short():
                self._owner.wait(signals.grace(_PATIENCE))
        except (subprocess.TimeoutExpired, Interrupted):
            self._owner.kill()  # QEMU ends with it
            self._owner.wait()
        self._directory.remove()

    def wait_until_ended(self, seconds: float | None = None) -> bool:
        """Wait until the VM has ended by itself, for `seconds` at most; returns whether it has."""
        poll = select.poll()
        poll.register(self._life, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def complaint(self) -> str:
        """Return what QEMU complains about; empty if it does not complain."""
        return first_complaint(_content(self._errors))

    def last_words(self) -> str:
        """Return the last thing that the guest said on its console."""
        return last_words(_content(self._console)) or "its console says nothing"

    def explain(self, failure: Failure) -> Failure:
        """Return `failure`. If the VM has ended and it is known why, the hint says so."""
        if failure.status == STATUS_FAILED and self.wait_until_ended(_SOON):
            why = self.complaint() or panic(_content(self._console))
            return Failure(str(failure), failure.status, why or failure.hint)
        return failure


def _start_owner(
    directory: VmDirectory,
    settings: QemuSettings,
    accelerator: str,
    life: socket.socket,
    errors: BinaryIO,
) -> "subprocess.Popen[bytes]":
    """Start the process that starts QEMU. It ends when the other end of `life` is closed."""
    with ExitStack() as stack:
        listeners = {name: stack.enter_context(each) for name, each in directory.listen().items()}
        console, guests_console = (stack.enter_context(each) for each in _pipe())
        own = (life.fileno(), directory.lock, console.fileno(), listeners.pop(CONSOLE).fileno())
        fds = {name: listener.fileno() for name, listener in listeners.items()}
        passed = (*fds.values(), guests_console.fileno())
        command = qemu_command(settings, accelerator, fds, guests_console.fileno())
        arguments = (*map(str, own), directory.log, ",".join(map(str, passed)), directory.path)
        owner = subprocess.Popen(
            # Python then runs without site, and imports nothing that the environment or the user provides.
            [sys.executable, "-I", "-S", keeper.__file__, *arguments, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(*own, *passed),
            # Neither Ctrl-C nor a terminal's hang-up is meant for the VM.
            start_new_session=True,
        )
    try:
        directory.leave_to(owner.pid)
    except Failure:
        owner.kill()  # QEMU ends with it
        owner.wait()
        raise
    return owner


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    reader, writer = os.pipe()
    return open(reader, "rb", 0), open(writer, "wb", 0)


def _content(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(_MOST_READ).decode(errors="replace")
