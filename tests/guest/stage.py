"""A daemon, VMs under QEMU, and cc-proxyctl, as processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cc_proxy.ctl.vm.directory import directory_of
from tests.ctl.running import popen_piped
from tests.ctl.vm.processes import children_of, ended, wait_until
from tests.wire.daemon import Daemon

#: Longer than anything takes on a slow machine that emulates.
WAIT = 150.0
TABLES = """
[log]
level = "console"
[vm]
ready_timeout = 100
ready_ping_after = 3
command_timeout = 100
"""
MIB = 1024 * 1024


class Stage:
    """Commands on one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.path = str(daemon.socket_path)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        return popen_piped(self.path, *arguments, **options)

    def run(self, *arguments: str, stdin: bytes = b"") -> tuple[bytes, bytes, int]:
        """Return what a command prints, what it says on stderr, and its exit status."""
        with self.start(*arguments) as child:
            output, errors = child.communicate(stdin, timeout=WAIT)
        return output, errors, child.returncode

    def works(self, container_id: str) -> bool:
        """Whether a second process can be run in a VM."""
        return self.run("exec", container_id, "--", "echo", "works") == (b"works\n", b"", 0)


def owner_of(container_id: str) -> int:
    """Return the pid of the process that owns a VM's QEMU."""
    return int(Path(directory_of(container_id), "owner").read_text())


def qemu_of(container_id: str) -> int:
    """Return the pid of a VM's QEMU."""
    (pid,) = children_of(owner_of(container_id))
    return pid


@contextlib.contextmanager
def vm(stage: Stage, container_id: str, *options: str) -> Iterator[str]:
    """A VM that stays for as long as the context lasts."""
    said = f"{container_id}: the VM is up\n".encode()
    outcome = stage.run("vm", "start", container_id, *options)
    assert outcome == (said, b"", 0), outcome
    owner = owner_of(container_id)
    try:
        yield container_id
    finally:
        if not ended(owner):
            outcome = stage.run("vm", "stop", container_id)
            assert outcome == (b"", b"", 0), outcome
        wait_until(lambda: ended(owner))
    assert not os.path.exists(directory_of(container_id))


def monitor(container_id: str, *commands: str) -> None:
    """Have QEMU carry out commands."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as lines:
        sock.settimeout(WAIT)
        sock.connect(os.path.join(directory_of(container_id), "qmp"))
        lines.readline()
        for command in ("qmp_capabilities", *commands):
            sock.sendall(json.dumps({"execute": command}).encode())
            while "return" not in json.loads(lines.readline()):
                pass


def random_bytes(size: int) -> tuple[bytes, str]:
    """Return some bytes and their SHA-256."""
    data = hashlib.shake_128(b"guest").digest(size)
    return data, hashlib.sha256(data).hexdigest()
