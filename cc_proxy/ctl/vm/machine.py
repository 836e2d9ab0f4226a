"""A VM, and the process that owns its QEMU."""

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

#: Seconds that the owner has to end, more than it gives QEMU.
_PATIENCE = 10.0
#: Seconds within which it is known that a VM that was lost has ended.
_SOON = 1.0
#: Bytes of what is read of a log: more than the console's has.
_MOST_READ = 256 * 1024


class Machine:
    """A VM that has been started, by a process of its own (keeper.py). `end` has to be called. One thread."""

    def __init__(self, directory: VmDirectory, settings: QemuSettings, accelerator: str) -> None:
        """Start it: it waits for QMP's `cont` then. Raises `Failure` or `OSError`; nothing is left then."""
        self.sockets = VmSockets(*map(directory.socket_path, (CTL, IO, CONSOLE)))
        self.qmp_path = directory.socket_path(QMP)
        self._directory = directory
        self._is_kept = False
        with ExitStack() as undo:
            undo.callback(directory.remove)
            #: What the guest has said, or the end of that; and what QEMU has said.
            self._console = undo.enter_context(open(directory.log, "w+b", 0))
            self._errors = undo.enter_context(open(directory.errors, "w+b", 0))
            #: At its end when the owner has ended, who ends when this is closed.
            self._life, owners_life = map(undo.enter_context, socket.socketpair())
            self._owner = _start_owner(directory, settings, accelerator, owners_life, self._errors)
            owners_life.close()
            undo.pop_all()

    def keep(self) -> None:
        """Have it go on after `end`."""
        self._life.send(b"\n")
        self._is_kept = True

    def end(self, signals: Signals) -> None:
        """End it, and leave nothing of it, unless it is kept."""
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
        """Wait until it has ended of itself; returns whether it has."""
        poll = select.poll()
        poll.register(self._life, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def complaint(self) -> str:
        """Return what QEMU complains about; nothing if it does not."""
        return first_complaint(_content(self._errors))

    def last_words(self) -> str:
        """Return what the guest has said to the last."""
        return last_words(_content(self._console)) or "its console says nothing"

    def explain(self, failure: Failure) -> Failure:
        """Return a failure whose hint is why the VM has ended, if it has and that is known."""
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
            # Without site, and without what the environment and the user's directory have.
            [sys.executable, "-I", "-S", keeper.__file__, *arguments, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(*own, *passed),
            # Neither Ctrl-C nor the end of a terminal is for a VM.
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
