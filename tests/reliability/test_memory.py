"""What has ended gives its memory back at once, without the collector of what refers to itself."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cc_proxy.api.payloads import Hello
from cc_proxy.hyperstart.codes import Code
from cc_proxy.linux.credentials import Credentials
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.settings import LiveSettings, Settings, SpoolSettings
from tests.connector import CONNECTOR
from tests.fuzz.acknowledging import AcknowledgingVm
from tests.proxy.house import UNKNOWN, House
from tests.proxy.support import read_to_end
from tests.wire.daemon import Daemon
from tests.wire.support import WAIT, request, wait_until


@contextmanager
def no_circles() -> Iterator[None]:
    """Nothing of the project's may be left that only the collector can free."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = {type(one).__qualname__ for one in gc.garbage if type(one).__module__.startswith("cc_proxy")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == set()


@pytest.fixture
def registry(tmp_sock_dir: Path) -> Registry:
    return Registry(LiveSettings(Settings(spool=SpoolSettings(directory=str(tmp_sock_dir)))), CONNECTOR)


def test_vm(tmp_sock_dir: Path, registry: Registry) -> None:
    """Its pump has half a megabyte of buffers."""
    with AcknowledgingVm(str(tmp_sock_dir)) as agent, no_circles():
        vm = registry.register(Hello("pod", agent.control_path, agent.io_path), Credentials.own())
        _, stream = vm.open_session(2, registry.users.of(vm.owner))
        vm.command(Code.PING, b"{}")
        vm.abort()
        assert vm.join(WAIT)
        with stream:
            assert read_to_end(stream) == b""
        del vm
        wait_until(lambda: not registry.vms(), "it has ended")
        registry.unregister("pod", Credentials.own())


def test_vm_that_never_came_up(registry: Registry) -> None:
    with no_circles(), pytest.raises(VmError):
        registry.register(Hello("pod", "relative", "relative"), Credentials.own())


def test_connection(tmp_sock_dir: Path) -> None:
    house = House(tmp_sock_dir)
    with no_circles():
        client = house.connect()
        client.send(request("x"))
        assert client.receive() == UNKNOWN
        client.close()
        wait_until(lambda: not len(house.server.roster), "it is gone")
    house.close()


def test_daemon_has_one_arena(tmp_sock_dir: Path) -> None:
    """malloc sets aside 64 MiB of addresses, at a multiple of that, for each but the first."""
    size = 64 * 1024 * 1024
    with Daemon.configured(tmp_sock_dir) as daemon:
        clients = [daemon.connect() for _ in range(10)]
        for client in clients:
            client.ask("x")
            client.close()
        lines = Path(f"/proc/{daemon.pid}/maps").read_text().splitlines()
    for (used, may_use, *_), (unused, may_not, *_) in itertools.pairwise(map(str.split, lines)):
        begin, end = int(used.split("-")[0], 16), int(unused.split("-")[1], 16)
        assert (begin % size, end - begin, may_use, may_not) != (0, size, "rw-p", "---p")
