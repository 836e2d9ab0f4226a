"""How one process of the daemon follows another in tests: started by the one before, or by a manager."""

from __future__ import annotations

import array
import mmap
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cc_proxy.continuity.box import Box
from cc_proxy.continuity.table import SIZE, Table
from tests.wire.support import WAIT

# What a manager does between fork and exec: LISTEN_PID has to be the daemon's own.
_PASSING = """
import os, sys
names, fds, *command = sys.argv[1:]
if names:
    given = list(map(int, fds.split(",")))
    high = [os.dup2(fd, 500 + number) for number, fd in enumerate(given)]
    for fd in given:
        os.close(fd)
    for number, fd in enumerate(high):
        os.dup2(fd, 3 + number)
        os.close(fd)
    os.environ["LISTEN_FDS"] = str(len(names.split(":")))
    os.environ["LISTEN_FDNAMES"] = names
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(command[0], command)
"""

#: What a command is put behind so that SIGTERM waits for it until it looks for signals.
ENDED_FROM_THE_START = (
    sys.executable,
    "-c",
    """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
""",
)

#: What a command line of Python is put behind so that the daemon kills itself just before, or just behind, it
#: sends what has a text in it.
KILLED_AT_A_SEND = """
import os, runpy, signal, sys
from cc_proxy.linux.receipt import Receipt

when, text = sys.argv[1:3]
send = Receipt.send

def send_and_die(self, fd, data):
    is_it = text.encode() in data
    if is_it and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, fd, data)
    if is_it:
        os.kill(os.getpid(), signal.SIGKILL)

Receipt.send = send_and_die
sys.argv = sys.argv[5:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Manager:
    """As much of a service manager as keeps fds, and starts the next process with them."""

    def __init__(self, directory: Path, most: int = 8) -> None:
        self._path = directory / "notify"
        self._most = most
        self.fds: list[tuple[str, int]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self._path))
        self._caught_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manager", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self._path)}

    def prefix(self) -> list[str]:
        """What to put in front of the daemon's command line, with `pass_fds`, so that it gets the fds."""
        names, fds = ":".join(name for name, _ in self.fds), ",".join(str(fd) for _, fd in self.fds)
        return [sys.executable, "-c", _PASSING, names, fds]

    def keeps(self, name: str) -> bool:
        """Whether something is kept under a name."""
        return name in dict(self.fds)

    def find(self, name: str) -> list[int]:
        """New fds of what is kept under a name."""
        return [os.dup(fd) for kept, fd in self.fds if kept == name]

    def box(self) -> Box:
        """The box that is kept."""
        return Box([socket.socket(fileno=fd) for fd in self.find("cc-proxy-box")])

    def table(self) -> Table:
        """The table that is kept, to read it."""
        [fd] = self.find("cc-proxy-table")
        memory = mmap.mmap(fd, SIZE)
        os.close(fd)
        return Table(memory)

    def drop(self) -> None:
        """Keep nothing any more."""
        while self.fds:
            os.close(self.fds.pop()[1])

    def catch_up(self) -> None:
        """Wait until all that daemons have said so far has been done."""
        self._caught_up.clear()
        self._say(b"CATCH UP")
        assert self._caught_up.wait(WAIT), "the manager's thread does not catch up with what daemons said"

    def close(self) -> None:
        self._say(b"STOP")
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the manager's thread does not end"
        self._sock.close()
        self.drop()

    def _say(self, text: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(WAIT)
            sock.sendto(text, str(self._path))

    def _run(self) -> None:
        while True:
            text, control, _, _ = self._sock.recvmsg(65_536, socket.CMSG_SPACE(1_024))
            fds = array.array("i")
            for _, _, data in control:
                fds.frombytes(data)
            if text == b"STOP":
                return
            if text == b"CATCH UP":
                self._caught_up.set()
                continue
            self._serve(dict(line.partition("=")[::2] for line in text.decode().split("\n")), list(fds))

    def _serve(self, said: dict[str, str], fds: Sequence[int]) -> None:
        if "FDSTOREREMOVE" in said:
            for name, fd in self.fds:
                if name == said["FDNAME"]:
                    os.close(fd)
            self.fds = [pair for pair in self.fds if pair[0] != said["FDNAME"]]
        for fd in fds:
            if "FDSTORE" in said and len(self.fds) < self._most:
                self.fds.insert(0, (said["FDNAME"], fd))  # the newest first, as systemd has them
            else:
                os.close(fd)
