"""cc-proxyctl in this process, and in one of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cc_proxy.cli.ctl import main
from tests.ctl.fake_proxy import FakeProxy

CHECKOUT = Path(__file__).parents[2]
#: What `run` needs to know of a VM that a fake proxy makes up.
VM = ("--ctl", "/vm/ctl", "--io", "/vm/io", "--id", "pod")
RUN = ("run", *VM)


def ctl(proxy: FakeProxy, *args: str) -> int:
    """Run the command in this process. Its stdin is empty."""
    return main(["--socket-path", proxy.path, *args])


def popen(socket_path: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "cc_proxy.cli.ctl", "--socket-path", socket_path, *args]
    return subprocess.Popen(command, cwd=CHECKOUT, **options)


def popen_piped(socket_path: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start it with a pipe for each standard stream that `options` do not name."""
    pipe = subprocess.PIPE
    return popen(socket_path, *args, **({"stdin": pipe, "stdout": pipe, "stderr": pipe} | options))


def take_terminal() -> None:
    """In a child that leads a session: make stdin its controlling terminal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(fd: int, mark: bytes) -> bytes:
    """Read up to and including `mark`, byte by byte. Fails at end of file."""
    seen = b""
    while not seen.endswith(mark):
        byte = os.read(fd, 1)
        assert byte, seen
        seen += byte
    return seen


def interrupt(signum: int) -> Callable[[], None]:
    """Return what sends a signal to the thread that runs a command in this process."""
    return lambda: signal.pthread_kill(threading.main_thread().ident or 0, signum)
