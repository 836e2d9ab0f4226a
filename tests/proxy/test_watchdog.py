"""What the watchdog is told: each part that hangs is noticed and named, and nothing that only waits."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import cast

import pytest

from cc_proxy.linux.credentials import ROOT
from cc_proxy.proxy import watchdog as watchdog_module
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.proxy.watchdog import Watchdog
from cc_proxy.settings import LiveSettings, Settings
from tests.connector import CONNECTOR
from tests.proxy.conftest import Logged
from tests.proxy.support import Rig
from tests.wire.support import WAIT

NEXT = 1_000.0


class Parts:
    """What is looked at: a registry with one VM, whose pump is a rig's, and a server that takes its turns."""

    def __init__(self, rig: Rig) -> None:
        live = LiveSettings(Settings())
        self.registry = Registry(live, CONNECTOR)
        self.vm = Vm("pod", ROOT, live, rig.space, lambda vm, state: None)
        self.vm._pump = rig.pump
        self.registry._vms[self.vm] = []
        self.parking = SimpleNamespace(probe=lambda: True)
        self.server = SimpleNamespace(
            turned_at=time.monotonic() + NEXT, is_free=lambda timeout: True, parking=self.parking
        )
        self.watchdog = Watchdog(cast(Server, self.server), self.registry)

    def check(self) -> bool:
        return self.watchdog.check(patience=10.0)


@pytest.fixture
def parts(rig: Rig) -> Parts:
    return Parts(rig)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_LOCK_TIMEOUT", 0.01)


def stuck(logged: Logged) -> list[dict[str, object]]:
    return logged.fields("stuck: the watchdog is not served")


def test_all_is_well(parts: Parts, rig: Rig, logged: Logged) -> None:
    for _ in range(3):
        assert parts.check()
        rig.wait_for_turn()
    assert logged.at(logging.INFO) == []


def test_a_parking_thread_that_hangs_is_named(parts: Parts, logged: Logged) -> None:
    parts.parking.probe = lambda: False
    assert not parts.check()
    assert stuck(logged)[0]["stuck"] == ["the parking thread"]


def test_pump_that_hangs_is_named_once_until_it_goes_on(parts: Parts, rig: Rig, logged: Logged) -> None:
    here, go = threading.Event(), threading.Event()

    def hang() -> None:
        here.set()
        go.wait(WAIT)

    assert parts.check()
    rig.wait_for_turn()
    rig.pump._mailbox.post(hang)
    assert here.wait(WAIT)
    try:
        assert parts.check(), "it has been asked only now"
        assert not parts.check()
        assert not parts.check()
        assert stuck(logged) == [{"stuck": ["the pump of VM pod"]}]
        (stack,) = [fields for fields in logged.fields("stack") if "pump vm" in str(fields["threads"])]
        assert "in hang" in str(stack["stack"]), "and where it hangs is logged"
    finally:
        go.set()
    rig.wait_for_turn()
    assert parts.check()
    assert logged.fields("not stuck any more: the watchdog is served") == [
        {"was_stuck": ["the pump of VM pod"]}
    ]


def test_pump_that_waits_for_the_vm_is_well(parts: Parts, space: SpoolSpace) -> None:
    """The VM takes nothing, so that only what it sends is waited for."""
    with Rig(space, io_buffer=4096) as rig:
        parts.vm._pump = rig.pump
        client = rig.open()
        client.sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.send(bytes(4000))
        rig.wait(lambda streams: streams.stdin_held > 0, "the VM takes nothing")
        for _ in range(3):
            assert parts.check()
            rig.wait_for_turn()


def test_pump_that_has_not_begun_or_has_ended_is_well(parts: Parts, space: SpoolSpace) -> None:
    with Rig(space, started=False) as rig:
        parts.vm._pump = rig.pump
        assert parts.check()
        assert parts.check()
        rig.pump.start()
        rig.pump.abort()
        assert rig.pump.join(WAIT)
        assert parts.check()
        assert parts.check()


def test_locks_that_are_not_given_back(parts: Parts, logged: Logged) -> None:
    parts.server.is_free = lambda timeout: False
    with parts.registry._lock:
        assert not parts.check()
    assert stuck(logged) == [{"stuck": ["the lock of the connections", "the lock of the VMs"]}]
    parts.server.is_free = lambda timeout: True
    assert parts.check()


def test_accept_thread_that_takes_no_turns(parts: Parts, rig: Rig, logged: Logged) -> None:
    parts.server.turned_at = time.monotonic() - 11
    assert not parts.check()
    assert stuck(logged) == [{"stuck": ["the accept thread"]}]
    parts.server.turned_at = time.monotonic()
    rig.wait_for_turn()
    assert parts.check()


def test_accept_thread_may_sleep_for_a_second_however_impatient_the_manager(parts: Parts) -> None:
    parts.server.turned_at = time.monotonic() - 0.3
    assert parts.watchdog.check(patience=0.1)
