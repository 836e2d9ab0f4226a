"""Owner of one QEMU, in a process of its own: keeper.py LIFE LOCK CONSOLE LOG PASSED DIRECTORY COMMAND...

QEMU ends with this process. This process ends when QEMU has, or when the peer of the socket LIFE goes away
(which it may, once it has sent a byte), and removes DIRECTORY. The fd LOCK is kept open meanwhile. What comes
from the fd CONSOLE goes to the file LOG, which stays short. PASSED are the fds that QEMU gets, separated by
commas. It runs as a file, without the package, to be small.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1
#: Seconds that QEMU has to end by itself: it may have to write to disks.
_PATIENCE = 5.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_READ_SIZE = 16 * 1024
#: Bytes of the log, about; then it begins anew.
_LONGEST_LOG = 64 * 1024


def main(life: int, console: int, log: str, passed: list[int], directory: str, command: list[str]) -> None:
    """Run QEMU until it ends or has to."""
    for number in _STOPPING:
        signal.signal(number, lambda *_: sys.exit())
    try:
        qemu = _start(command, passed)
        try:
            _wait(life, qemu, console, log)
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


def _wait(life: int, qemu: "subprocess.Popen[bytes]", console: int, log: str) -> None:
    """Return when QEMU has ended, or LIFE has before anything was said there."""
    ended = os.pidfd_open(qemu.pid)
    poll = select.poll()
    for fd in (life, ended, console):
        poll.register(fd, select.POLLIN)
    with open(log, "ab", 0) as file:
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if console in ready and not _copy(console, file):
                poll.unregister(console)
            if life in ready:
                if not os.read(life, 1):
                    return
                poll.unregister(life)
            if ended in ready:
                return


def _copy(console: int, log: BinaryIO) -> bool:
    """Copy what has come; returns whether more may."""
    data = os.read(console, _READ_SIZE)
    if os.fstat(log.fileno()).st_size > _LONGEST_LOG:
        log.truncate(0)
    with suppress(OSError):  # no disk space: the log is a help, nothing more
        log.write(data)
    return bool(data)


def _end(qemu: "subprocess.Popen[bytes]") -> None:
    qemu.terminate()
    try:
        qemu.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        qemu.kill()
        qemu.wait()


if __name__ == "__main__":
    life_fd, lock_fd, console_fd = map(int, sys.argv[1:4])
    for own in (life_fd, lock_fd, console_fd):
        os.set_inheritable(own, False)
    fds = [int(fd) for fd in sys.argv[5].split(",")]
    main(life_fd, console_fd, sys.argv[4], fds, sys.argv[6], sys.argv[7:])
