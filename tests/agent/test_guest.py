"""The agent as the first process of a machine: here of a PID namespace, whose ports are terminals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.agent.accounts import Account, FileAccounts
from cc_proxy.agent.program import run_guest
from cc_proxy.api.frames import FRAME_HEADER, Frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, ControlMessage, encode
from tests.agent.host import PATIENCE, process
from tests.agent.test_virtio_port import READY, TOLD, Terminal

CHECKOUT = Path(__file__).parents[2]
#: Makes a machine of a namespace: what a guest's kernel shows, and nothing of this system's own.
MACHINE = """
set -e
mount --bind /tmp /tmp
mount -t tmpfs none /sys
mkdir -p /sys/fs/cgroup /sys/bus/virtio/devices/virtio1
mkdir -p /sys/class/virtio-ports/vport0p1 /sys/class/virtio-ports/vport0p2
echo sh.hyper.channel.0 >/sys/class/virtio-ports/vport0p1/name
echo sh.hyper.channel.1 >/sys/class/virtio-ports/vport0p2/name
echo 0x001a >/sys/bus/virtio/devices/virtio1/device
mount -t tmpfs none /mnt
touch /mnt/vport0p1 /mnt/vport0p2
mount --bind "$1" /mnt/vport0p1
mount --bind "$2" /mnt/vport0p2
mknod /mnt/null c 1 3
mkdir /mnt/pts
mount --move /mnt /dev
shift 2
exec "$@"
"""
#: Has a directory in the place of what the hypervisor shares.
SHARES = """
import sys
from cc_proxy.agent import kernel
from cc_proxy.agent.program import run_guest

def mount(source, target, kind, flags=0, options="", mount=kernel.mount):
    if kind == "virtiofs":
        mount(sys.argv[1], target, "none", kernel.BIND)
    else:
        mount(source, target, kind, flags, options)

kernel.mount = mount
run_guest()
"""
UNSHARE = ["unshare", "--pid", "--mount", "--mount-proc", "--uts", "--ipc", "--net", "--fork", "--kill-child"]


def output_of(*command: str) -> str:
    """What a program prints; nothing if it fails."""
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout if done.returncode == 0 else ""


def can_unshare() -> bool:
    return os.geteuid() == 0 and output_of(*UNSHARE, "echo", "yes") == "yes\n"


as_root = pytest.mark.skipif(not can_unshare(), reason="only root may make a machine of namespaces")


class Machine:
    """The host's side of one."""

    def __init__(self, ctl: Terminal, io: Terminal, popen: subprocess.Popen[bytes]) -> None:
        self.ctl, self.io, self.popen = ctl, io, popen
        assert ctl.read(len(READY)) == READY
        assert io.read(len(TOLD)) == TOLD

    def ask(self, code: Code, data: Any = None) -> ControlMessage:
        os.write(self.ctl.host, encode(code, b"" if data is None else json.dumps(data).encode()))
        message = ControlMessage(Code.NEXT)
        while message.code == Code.NEXT:
            code_, length = HEADER.unpack(self.ctl.read(HEADER.size))
            message = ControlMessage(code_, self.ctl.read(length - HEADER.size))
        return message

    def frame(self) -> Frame:
        seq, length = FRAME_HEADER.unpack(self.io.read(FRAME_HEADER.size))
        return Frame(seq, self.io.read(length - FRAME_HEADER.size))

    def run(self, script: str, **more: Any) -> str:
        """Runs a shell in a container of its own; returns what it printed."""
        share = more.pop("share", "")
        assert self.ask(Code.START_POD, {"hostname": "machine", "shareDir": share}).code == Code.ACK
        command = {
            "id": "c",
            "image": "i",
            "rootfs": "rootfs",
            "process": process("sh", "-c", script, **more),
        }
        assert self.ask(Code.NEW_CONTAINER, command).code == Code.ACK
        output = b""
        while (frame := self.frame()).payload:
            output += frame.payload
        assert self.frame() == Frame(1, b"\0"), output
        return output.decode()

    def power_off(self) -> str:
        """Ends it; returns what it said on its console."""
        assert self.ask(Code.DESTROY_POD).code == Code.ACK
        _, said = self.popen.communicate(timeout=PATIENCE)
        # The kernel has the first process of a namespace killed so in place of powering off.
        assert self.popen.returncode in (-2, 130)
        return said.decode()


@contextmanager
def machine(*program: str) -> Iterator[Machine]:
    with ExitStack() as stack:
        ctl, io = stack.enter_context(closing(Terminal())), stack.enter_context(closing(Terminal()))
        command = [*UNSHARE, "sh", "-c", MACHINE, "-", ctl.path, io.path, sys.executable, *program]
        popen = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            yield Machine(ctl, io, popen)
        finally:
            popen.kill()
            popen.communicate()


@as_root
def test_machine_has_all_that_programs_expect() -> None:
    with machine("-m", "cc_proxy.agent", "--guest") as guest:
        said = guest.run(
            "hostname; awk '{print $5}' /proc/self/mountinfo; readlink /dev/fd /dev/stderr; echo $$;"
            "grep -c 127.0.0.1 /proc/net/fib_trie; ls /proc/self/fd"
        )
        lines = said.splitlines()
        assert lines[0] == "machine"
        assert {"/dev/pts", "/dev/shm", "/run", "/sys/fs/cgroup", "/tmp"} <= set(lines)
        assert lines.count("/tmp") == 1, "what was mounted before is not hidden"
        assert "/proc/self/fd" in lines
        assert "/proc/self/fd/2" in lines
        assert guest.power_off() == "cc-proxy agent: serves its two ports\n"


@as_root
def test_all_orphans_are_waited_for() -> None:
    with machine("-m", "cc_proxy.agent", "--guest") as guest:
        # The first holder of the output stays a zombie meanwhile, and must not hide the others.
        said = guest.run(
            "(sleep 0.2; for n in 1 2 3; do (sleep 0 &); done; sleep 0.3; grep -l ') Z ' /proc/[0-9]*/stat) &"
        )
        assert len(said.split()) == 1
        guest.power_off()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A directory with one root: a shell, and what it needs."""
    root = tmp_path / "i/rootfs"
    for program in ("sh", "id", "ls", "cat"):
        path = shutil.which(program)
        assert path
        for file in (path, *re.findall(r"/\S+", output_of("ldd", path))):
            target = root / file.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("wrong\nsomebody:x:1234:5678::/:/bin/sh\n")
    (root / "etc/group").write_text("theirs:x:5678:\nothers:x:77:somebody,else\nmore:x:x:\n")
    (root / "only-here").write_text("content")
    return tmp_path


@as_root
def test_container_has_its_root_from_what_is_shared(share: Path) -> None:
    with machine("-c", SHARES, str(share)) as guest:
        script = "cd /; echo *; id -u; id -G; cat /proc/self/comm; ls /dev/null"
        lines = guest.run(script, share="rootfs", user="somebody").splitlines()
        assert {"only-here", "proc", "sys", "dev"} <= set(lines[0].split())
        assert lines[1:] == ["1234", "5678 77", "cat", "/dev/null"]
        # Nothing of it stays mounted; and what is not shared is no root.
        said = guest.run("grep -c cc-proxy/shared /proc/self/mountinfo || :")
        assert said == "0\n"
        assert guest.ask(Code.START_POD, {"shareDir": "rootfs"}).code == Code.ACK
        no_image = {"id": "d", "image": "no", "rootfs": "rootfs", "process": process("true")}
        assert guest.ask(Code.NEW_CONTAINER, no_image).code == Code.ERROR
        no_directory = no_image | {"image": "i", "process": process("true", workdir="/no")}
        assert guest.ask(Code.NEW_CONTAINER, no_directory).code == Code.ERROR
        volume = {"image": "i", "fsmap": [{"source": "data", "path": "/data", "readOnly": False}]}
        assert guest.ask(Code.NEW_CONTAINER, no_image | volume).code == Code.ERROR
        assert guest.power_off().splitlines()[1:] == [
            "cc-proxy agent: newcontainer: no directory no/rootfs is shared",
            "cc-proxy agent: newcontainer: no directory '/no'",
            "cc-proxy agent: newcontainer: fsmap has to be empty: this agent mounts no volumes",
        ]


def test_elsewhere_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guest() == 2
    assert (
        capsys.readouterr().err == "cc-proxy agent: --guest is for the first process of a virtual machine\n"
    )


def test_usage() -> None:
    program = [sys.executable, "-m", "cc_proxy.agent"]
    done = subprocess.run(program, cwd=CHECKOUT, check=False, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"usage: python3 -m cc_proxy.agent --guest (elsewhere: cc-proxyctl agent)\n"


def test_accounts_in_files(share: Path) -> None:
    accounts = FileAccounts(str(share / "i/rootfs"))
    somebody = Account("somebody", 1234, 5678)
    assert accounts.user("somebody") == accounts.user_by_id(1234) == somebody
    assert accounts.user("wrong") is accounts.user_by_id(0) is None
    assert (accounts.group("others"), accounts.group("more")) == (77, None)
    assert accounts.groups_of(somebody, 5678) == [5678, 77]
    assert FileAccounts("/no/such").user("root") is None
