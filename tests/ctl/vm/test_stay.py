"""`vm start` and `vm stop`, with a stand-in for QEMU and for the proxy."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.ctl.fake_proxy import FakeProxy
from tests.ctl.running import ctl, popen_piped
from tests.ctl.test_single import error_line
from tests.ctl.vm.processes import children_of, ended, wait_until
from tests.wire.support import WAIT

START = ("vm", "start", "web", "--append")
BOOTS = "starts boots"
UNKNOWN = "unknown containerID: web"


@pytest.fixture(autouse=True)
def used(settings: Path) -> None:
    """All of them use the stand-in."""


def start(proxy: FakeProxy, steps: str = BOOTS) -> tuple[bytes, bytes, int]:
    """In a process of its own: what it starts is not to be this one's child."""
    with popen_piped(proxy.path, *START, steps) as child:
        output, errors = child.communicate()
    return output, errors, child.returncode


def owner_of(directories: Path) -> int:
    (file,) = directories.glob("*/owner")
    return int(file.read_text())


def test_it_stays_until_it_is_stopped(
    proxy: FakeProxy, directories: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(proxy) == (b"web: the VM is up\n", b"", 0)
    assert proxy.names == ["hello", "startpod", "allocateIO", "newcontainer"]
    owner = owner_of(directories)
    (qemu,) = children_of(owner)
    assert ctl(proxy, "vm", "stop", "web") == 0
    assert proxy.names[4:] == ["attach", "attach", "destroypod", "bye"]
    assert ended(owner, qemu)
    assert list(directories.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_it_is_stopped_without_a_proxy_too(
    tmp_sock_dir: Path, directories: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with FakeProxy(tmp_sock_dir / "another") as proxy:
        start(proxy)
    owner = owner_of(directories)
    assert ctl(proxy, "vm", "stop", "web") == 0
    assert ended(owner)
    assert capfd.readouterr() == ("", "")


def test_one_that_the_proxy_has_forgotten_is_stopped(proxy: FakeProxy, directories: Path) -> None:
    start(proxy)
    owner = owner_of(directories)
    proxy.refused["attach"] = UNKNOWN
    assert ctl(proxy, "vm", "stop", "web") == 0
    assert ended(owner)


def test_one_that_was_never_started(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.refused["attach"] = UNKNOWN
    assert ctl(proxy, "vm", "stop", "web") == 125
    assert error_line(capfd).startswith(UNKNOWN)


def test_one_that_others_have_started_is_left_alone(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    """A runtime's container is not to be destroyed by a command that is for VMs of one's own."""
    assert ctl(proxy, "vm", "stop", "web") == 125
    wrong = "web: no VM that you have started with `vm start` (`cc-proxyctl bye web` unregisters it)"
    assert error_line(capfd) == wrong
    assert proxy.names == ["attach"]


def test_one_that_runs_already(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    start(proxy)
    runs = "web: a VM with this id runs already (`cc-proxyctl vm stop web` ends it)"
    assert ctl(proxy, *START, BOOTS) == 125
    assert error_line(capfd) == runs
    assert ctl(proxy, "vm", "stop", "web") == 0


@pytest.mark.parametrize("request_", ["hello", "startpod", "newcontainer"])
def test_nothing_is_left_of_one_that_is_refused(proxy: FakeProxy, directories: Path, request_: str) -> None:
    proxy.refused[request_] = "no"
    assert start(proxy) == (b"", b"cc-proxyctl: no\n", 125)
    assert list(directories.iterdir()) == []
    assert ("bye" in proxy.names) == (request_ != "hello")


def test_a_qemu_that_is_killed_leaves_nothing(proxy: FakeProxy, directories: Path) -> None:
    start(proxy)
    owner = owner_of(directories)
    os.kill(children_of(owner)[0], signal.SIGKILL)
    wait_until(lambda: ended(owner))
    assert list(directories.iterdir()) == []


def test_an_owner_that_is_killed_takes_qemu_along(proxy: FakeProxy, directories: Path) -> None:
    start(proxy)
    owner = owner_of(directories)
    (qemu,) = children_of(owner)
    os.kill(owner, signal.SIGKILL)
    wait_until(lambda: ended(owner, qemu))
    assert start(proxy)[2] == 0  # the id is free, and what was left is gone
    assert ctl(proxy, "vm", "stop", "web") == 0


def test_what_a_killed_owner_leaves_is_removed(proxy: FakeProxy, directories: Path) -> None:
    start(proxy)
    owner = owner_of(directories)
    os.kill(owner, signal.SIGKILL)
    wait_until(lambda: ended(owner))
    assert ctl(proxy, "vm", "stop", "web") == 0
    assert list(directories.iterdir()) == []


def test_what_nobody_was_there_for_waits_on_the_console(proxy: FakeProxy, directories: Path) -> None:
    """The daemon connects when the guest has booted, and a second one when the first has gone."""
    start(proxy, "starts says:booting boots says-when-told:more")
    (path,) = directories.glob("*/console")
    (qemu,) = children_of(owner_of(directories))
    for said in (b"booting\r\n", b"more\r\n"):
        with socket.socket(socket.AF_UNIX) as console:
            console.settimeout(WAIT)
            console.connect(str(path))
            assert console.recv(100) == said
            os.kill(qemu, signal.SIGUSR1)
            assert console.recv(100) == b"more\r\n"
        os.kill(qemu, signal.SIGUSR1)
    assert ctl(proxy, "vm", "stop", "web") == 0


def test_only_start_has_settings(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(proxy, "vm", "stop", "web", "--cpus", "2") == 2
    assert error_line(capfd) == "--cpus says how to start a VM: it goes with `run --vm` or `vm start`"
