"""An embedded agent for a single `run`: a child process, with its sockets in a private directory."""

import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cc_proxy
from cc_proxy.ctl.agentlog import DIRECTORY_PREFIX, log_name, parent
from cc_proxy.ctl.errors import Failure, Interrupted
from cc_proxy.ctl.options import VmSockets
from cc_proxy.ctl.signals import Signals

#: Seconds that an agent may take to listen, or to end.
_PATIENCE = 10.0


@contextmanager
def local_agent(signals: Signals, container_id: str, console: str) -> Iterator[VmSockets]:
    """Run an agent as long as the context lasts; yields the sockets of the VM that it stands in for.

    `container_id` is the id under which that VM will be registered. Raises `Failure` if the agent does not
    come up, `Interrupted` if a signal comes first.
    """
    with tempfile.TemporaryDirectory(
        prefix=DIRECTORY_PREFIX, dir=parent(), ignore_cleanup_errors=True
    ) as path:
        vm = VmSockets(os.path.join(path, "ctl.sock"), os.path.join(path, "io.sock"), console)
        log = Path(path, log_name(container_id))
        with _running_agent(vm, log, signals) as ready:
            with signals.may_interrupt():
                _wait_until_ready(ready, log)
            yield vm


@contextmanager
def _running_agent(vm: VmSockets, log: Path, signals: Signals) -> Iterator[socket.socket]:
    """Yield the socket on which the agent announces that it listens. Closing it ends the agent."""
    ready, announce = socket.socketpair()
    with ready:
        with announce:
            process = _start(vm, log, announce.fileno())
        try:
            yield ready
        finally:
            _stop(process, signals)


def _start(vm: VmSockets, log: Path, announce: int) -> subprocess.Popen[bytes]:
    command = ["agent", "--ctl", vm.ctl, "--io", vm.io, "--ready-fd", str(announce)]
    # Users want all of their stdin to arrive. Only tests want an agent that loses some, as hyperstart does.
    command += ["--remove", str(log.parent), "--lossless"]
    with log.open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "cc_proxy.cli.ctl", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(announce,),
            # Python then imports this very package, and nothing from the user's working directory.
            cwd=Path(cc_proxy.__file__).parent.parent,
            # Ctrl-C is meant for the process in the container, not for the agent.
            process_group=0,
        )


def _wait_until_ready(ready: socket.socket, log: Path) -> None:
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    if not poll.poll(_PATIENCE * 1000):
        raise Failure(f"the embedded agent does not listen after {_PATIENCE:.0f} s")
    if not ready.recv(1):
        raise Failure(f"the embedded agent did not start: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it did not say why")


def _stop(process: subprocess.Popen[bytes], signals: Signals) -> None:
    process.terminate()
    try:
        with signals.may_be_cut_short():
            process.wait(signals.grace(_PATIENCE))
    except (subprocess.TimeoutExpired, Interrupted):
        process.kill()
        process.wait()
