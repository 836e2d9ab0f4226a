"""How VMs begin and end."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.ctl.vm import keeper
from cc_proxy.ctl.vm.directory import directory_of
from tests.ctl.running import CHECKOUT
from tests.ctl.vm.processes import ended, wait_until
from tests.guest.stage import MIB, TABLES, WAIT, Stage, owner_of, qemu_of, random_bytes, vm
from tests.users import ALICE, give, needs_root
from tests.wire.daemon import Daemon, ManagedDaemon

ENDED = "the VM ended before it was ready"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(200)]


def outcomes(stage: Stage, *commands: tuple[str, ...]) -> list[tuple[bytes, bytes, int]]:
    """What `run --vm` prints, what it says on stderr, and its exit status: of several at once."""
    with ExitStack() as stack:
        children = [stack.enter_context(stage.start("run", "--vm", *command)) for command in commands]
        return [(*child.communicate(timeout=WAIT), child.returncode) for child in children]


def test_ten_vms_at_once(stage: Stage) -> None:
    commands = [("--id", f"vm{n}", "--", "hostname") for n in range(10)]
    assert outcomes(stage, *commands) == [(f"vm{n}\n".encode(), b"", 0) for n in range(10)]


def test_machines(stage: Stage) -> None:
    """The second has a CPU without random numbers, too."""
    settings = ("--memory", "200", "--cpus", "2", "--append", "loglevel=5")
    shell = "nproc; grep -c loglevel=5 /proc/cmdline; awk '/MemTotal/ { print ($2 < 204800) }' /proc/meminfo"
    commands = [
        ("--machine", "q35", *settings, "--", "sh", "-c", shell),
        ("--machine", "pc", "--qemu-arg=-cpu", "--qemu-arg=Nehalem", *settings, "--", "sh", "-c", shell),
    ]
    assert outcomes(stage, *commands) == [(b"2\n1\n1\n", b"", 0)] * 2


def test_guests_that_do_not_boot(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(gzip.compress(b"nothing"))
    options = {
        "--append=rdinit=/no": f"{ENDED}: Kernel panic - not syncing: ",
        "--memory=96": f"{ENDED}: Kernel panic - not syncing: System is deadlocked",
        "--memory=16000000": "QEMU failed: qemu-system-x86_64: cannot set up guest memory",
        "--qemu-arg=-nonsense": "QEMU failed: qemu-system-x86_64: -nonsense: invalid option",
        "--qemu-arg=-set --qemu-arg=device.ctl.name=x": f"{ENDED}: cc-proxy agent: no virtio-serial port is",
        f"--image={tmp_path}/image": f"{ENDED}: Kernel panic - not syncing: VFS: Unable to mount root",
    }
    ends = outcomes(stage, *((*option.split(), "--", "true") for option in options))
    for complaint, (output, errors, status) in zip(options.values(), ends, strict=True):
        assert (output, status) == (b"", 125)
        assert errors.decode().startswith(f"cc-proxyctl: {complaint}")
        assert errors.count(b"\n") == 1


@pytest.mark.parametrize("victim", ["QEMU", "its owner"])
def test_a_vm_that_is_killed(stage: Stage, victim: str) -> None:
    with vm(stage, "pod"), stage.start("exec", "-i", "pod", "--", "sh", "-c", "echo ready; cat") as child:
        assert child.stdout
        assert child.stdout.readline() == b"ready\n"
        qemu, owner = qemu_of("pod"), owner_of("pod")
        os.kill(qemu if victim == "QEMU" else owner, signal.SIGKILL)
        _, errors = child.communicate(timeout=WAIT)
        assert child.returncode == 125
        assert re.match(rb"cc-proxyctl: the VM (was lost|has gone) before 'sh' had ended", errors)
        wait_until(lambda: ended(qemu, owner))
        if victim == "its owner":
            stage.run("vm", "stop", "pod")


def test_a_panic_says_why(stage: Stage) -> None:
    _, errors, status = stage.run("run", "--vm", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert status == 125
    assert b"(Kernel panic - not syncing: sysrq triggered crash)" in errors


def test_a_daemon_that_restarts_finds_the_vm_again(environment: Path, tmp_sock_dir: Path) -> None:
    with Daemon.configured(tmp_sock_dir, TABLES) as first, vm(Stage(first), "pod"):
        first.kill()
        with Daemon.configured(tmp_sock_dir, TABLES) as second:
            stage = Stage(second)
            where = directory_of("pod")
            sockets = [f"--{name}={where}/{name}" for name in ("ctl", "io", "console")]
            assert stage.run("hello", "pod", *sockets) == (b"", b"", 0)
            assert stage.works("pod")
            assert stage.run("vm", "stop", "pod") == (b"", b"", 0)


def planned(daemon: Daemon) -> None:
    daemon.replace()


@pytest.mark.parametrize("replace", [planned])
def test_a_daemon_that_is_replaced_while_a_process_streams(
    environment: Path, tmp_sock_dir: Path, replace: Callable[[Daemon], None]
) -> None:
    """Both ways, several times: not a byte is missing, and neither end is told anything."""
    data, _ = random_bytes(2 * MIB)
    with ManagedDaemon(tmp_sock_dir, TABLES) as daemon, vm(stage := Stage(daemon), "pod"):
        shell = "cat; echo that was all >&2; exit 7"
        with (
            ThreadPoolExecutor(1) as pool,
            stage.start("exec", "-i", "pod", "--", "sh", "-c", shell) as child,
        ):
            assert child.stdin
            assert child.stdout
            assert child.stderr
            pool.submit(lambda stdin: stdin.write(data) and stdin.close(), child.stdin)
            for quarter in range(4):
                begin, end = (len(data) * each // 4 for each in (quarter, quarter + 1))
                assert child.stdout.read(end - begin) == data[begin:end]
                replace(daemon)
            assert (child.stdout.read(), child.stderr.read(), child.wait()) == (b"", b"that was all\n", 7)
        assert stage.works("pod")
        daemon.check_log()


#: Runs a command as a user without any rights, though only root may be able to read the code.
AS_ALICE = f"""
import os, sys
from cc_proxy.cli.ctl import build_parser, main
from cc_proxy.ctl.vm import keeper
build_parser()  # which imports what it needs
keeper.__file__, sys.executable = sys.argv[1], "/usr/bin/python3"
os.setgroups([])
os.setresgid({ALICE.gid}, {ALICE.gid}, {ALICE.gid})
os.setresuid({ALICE.uid}, {ALICE.uid}, {ALICE.uid})
sys.exit(main(sys.argv[2:]))
"""


@needs_root
def test_anybody_may_start_one(guest: Path, open_dir: Path) -> None:
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("there is no /usr/bin/python3, which another user could run")
    mine = open_dir / "alice"
    mine.mkdir()
    for file in (guest / "vmlinuz", guest / "initramfs", Path(keeper.__file__)):
        shutil.copy(file, mine)
        (mine / file.name).chmod(0o644)
    give(mine, ALICE)
    tables = f"{TABLES}[access]\nusers = [{ALICE.uid}]\n"
    with Daemon.configured(open_dir, tables) as daemon:
        command = ["--socket-path", str(daemon.socket_path), "run", "--vm", "--accelerator=tcg"]
        command += [f"--kernel={mine}/vmlinuz", f"--image={mine}/initramfs", "--boot-timeout=150"]
        environment = os.environ | {"TMPDIR": str(mine), "CC_PROXY_GUEST": ""}
        arguments = [sys.executable, "-c", AS_ALICE, f"{mine}/keeper.py", *command, "--", "id", "-u"]
        result = subprocess.run(arguments, check=False, capture_output=True, env=environment, cwd=CHECKOUT)
        assert result.stderr.decode() == ""
        assert (result.stdout, result.returncode) == (b"0\n", 0)
        assert not list(mine.glob("cc-proxyctl-*"))
        daemon.check()
