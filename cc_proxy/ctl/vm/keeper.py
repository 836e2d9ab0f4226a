"""The owner of one QEMU: a process of its own.

keeper.py LIFE LOCK CONSOLE LISTENER LOG PASSED DIRECTORY COMMAND...

COMMAND starts QEMU, which ends with this process. This process ends when QEMU has ended, or when the peer of
the socket LIFE goes away without having sent a byte, and then removes DIRECTORY. Until then it keeps the fd
LOCK open. What the guest writes to its console arrives on the fd CONSOLE, and goes to the file LOG, which
stays short, and to the peer that connects to the socket LISTENER. PASSED are the fds for QEMU, separated by
commas.

It is run as a file, and imports nothing of the package, to stay small.
"""

import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1
#: Seconds that QEMU has to end after SIGTERM: it may have to write to disks.
_PATIENCE = 5.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: As much as a pipe holds: after QEMU has ended, a single read gets all that is left.
_READ_SIZE = 64 * 1024
#: When the log exceeds this many bytes, it is emptied. As many bytes, the latest, are kept for the peer.
_LONGEST_LOG = 64 * 1024


class GuestConsole:
    """The guest's console. The daemon connects to it only after the guest has booted, and gets all of it."""

    def __init__(self, source: int, listener: int, log: BinaryIO) -> None:
        """`source` is the fd on which the console arrives, `listener` that of a listening socket."""
        self.source = source
        self.listener = socket.socket(fileno=listener)
        self._log = log
        self._peer: socket.socket | None = None
        self._unsent = b""

    def copy(self) -> bool:
        """Read what has arrived, and pass it on; returns whether more may come."""
        data = os.read(self.source, _READ_SIZE)
        if os.fstat(self._log.fileno()).st_size > _LONGEST_LOG:
            self._log.truncate(0)
        with suppress(OSError):  # the disk is full: a VM does not depend on its log
            self._log.write(data)
        self._unsent = (self._unsent + data)[-_LONGEST_LOG:]
        self._send()
        return bool(data)

    def accept(self) -> None:
        """Accept a peer. It takes the place of the one before."""
        if self._peer:
            self._peer.close()
        self._peer, _ = self.listener.accept()
        self._send()

    def _send(self) -> None:
        """Send as much as the peer takes now. The guest never waits for the peer."""
        if self._peer is None:
            return
        try:
            sent = self._peer.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self._peer.close()
            self._peer = None
            return
        self._unsent = self._unsent[sent:]


def main(life: int, console: GuestConsole, passed: list[int], directory: str, command: list[str]) -> None:
    """Run QEMU until it ends, or has to be ended; then remove the directory."""
    for number in _STOPPING:
        signal.signal(number, lambda *_: sys.exit())
    try:
        qemu = _start(command, passed)
        try:
            _wait(life, qemu, console)
        finally:
            for number in _STOPPING:
                signal.signal(number, signal.SIG_IGN)
            _end(qemu)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _start(command: list[str], passed: list[int]) -> "subprocess.Popen[bytes]":
    me = os.getpid()
    prctl = ctypes.CDLL(None).prctl

    def end_with_me() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != me:
            os.kill(os.getpid(), signal.SIGKILL)

    qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed, preexec_fn=end_with_me)  # noqa: PLW1509
    for fd in passed:
        os.close(fd)
    return qemu


def _wait(life: int, qemu: "subprocess.Popen[bytes]", console: GuestConsole) -> None:
    """Return when QEMU has ended, or when LIFE's peer has gone without having sent a byte."""
    ended = os.pidfd_open(qemu.pid)
    poll = select.poll()
    for fd in (life, ended, console.source, console.listener):
        poll.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if console.listener.fileno() in ready:
            console.accept()
        if console.source in ready and not console.copy():
            poll.unregister(console.source)
        if life in ready:
            if not os.read(life, 1):
                return
            poll.unregister(life)
        if ended in ready:
            return


def _end(qemu: "subprocess.Popen[bytes]") -> None:
    qemu.terminate()
    try:
        qemu.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        qemu.kill()
        qemu.wait()


if __name__ == "__main__":
    life_fd, lock_fd, console_fd, listener_fd = map(int, sys.argv[1:5])
    for own in (life_fd, lock_fd, console_fd, listener_fd):
        os.set_inheritable(own, False)
    fds = [int(fd) for fd in sys.argv[6].split(",")]
    with open(sys.argv[5], "ab", 0) as log_file:
        main(life_fd, GuestConsole(console_fd, listener_fd, log_file), fds, sys.argv[7], sys.argv[8:])
