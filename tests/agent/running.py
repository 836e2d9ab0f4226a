"""Embedded agents for tests: in a thread of the test, or as a program of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

from cc_proxy.agent import Agent, Panic, Quirks
from tests.agent.host import PATIENCE, until

_PROGRAM = """
import sys
from cc_proxy.agent import Quirks, run_agent
sys.exit(run_agent({ctl!r}, {io!r}, {quirks!r}))
"""


def is_listening(path: Path) -> bool:
    """Whether one can connect to a socket, found out without doing so."""
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(fields[-1] == str(path) and fields[3] == "00010000" for fields in sockets)


class AgentThread:
    """An agent in a thread of this process, so that what it leaks is what the test leaks."""

    def __init__(self, directory: Path, quirks: Quirks, *, lossless: bool = False) -> None:
        self.ctl, self.io = directory / "ctl", directory / "io"
        self.agent = Agent(self.ctl, self.io, quirks, lossless=lossless)
        #: What ended it, if that was a panic.
        self.panic: Panic | None = None
        self._thread = threading.Thread(target=self._serve, name="agent")

    def _serve(self) -> None:
        try:
            self.agent.serve()
        except Panic as panic:
            self.panic = panic

    def join(self) -> None:
        """Waits until it has ended by itself."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.agent.stop()
        self.join()
        self.agent.close()


class AgentProgram:
    """An agent in a process of its own, as users run it."""

    def __init__(self, directory: Path, quirks: Quirks, *, prefix: tuple[str, ...] = ()) -> None:
        self.ctl, self.io = directory / "ctl", directory / "io"
        code = _PROGRAM.format(ctl=str(self.ctl), io=str(self.io), quirks=quirks)
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )

    def wait(self) -> tuple[int, str]:
        """Waits until it has ended; returns its exit status and what it said."""
        _, said = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode, said.decode()

    def __enter__(self) -> Self:
        until(lambda: is_listening(self.io) or self.popen.poll() is not None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.returncode is None:
            self.popen.send_signal(signal.SIGTERM)
        self.wait()
