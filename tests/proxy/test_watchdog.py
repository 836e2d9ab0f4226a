"""What the watchdog is told: each part that hangs is noticed and named, and nothing that only waits."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import cast

import pytest

from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.watchdog import Watchdog
from tests.proxy.conftest import Logged
from tests.proxy.support import Rig, read_now
from tests.wire.support import WAIT, frame, read_exact

NEXT = 1_000.0


class Parts:
    """What is looked at: a registry with one VM, whose pump is a rig's, and a server that takes its turns."""

    def __init__(self, rig: Rig) -> None:
        self.vm = SimpleNamespace(container_id="pod", probe=rig.pump.probe)
        self.registry = SimpleNamespace(vms=lambda: [self.vm], is_free=lambda timeout: True)
        self.parking = SimpleNamespace(probe=lambda: True)
        self.server = SimpleNamespace(
            turned_at=time.monotonic() + NEXT,
            roster=SimpleNamespace(is_free=lambda timeout: True),
            parking=self.parking,
        )
        self.watchdog = Watchdog(cast(Server, self.server), cast(Registry, self.registry))

    def check(self) -> bool:
        return self.watchdog.check(patience=10.0)


@pytest.fixture
def parts(rig: Rig) -> Parts:
    return Parts(rig)


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


def test_pump_that_hangs_is_named_once_until_it_goes_on(space: SpoolSpace, logged: Logged) -> None:
    hangs, here, go = threading.Event(), threading.Event(), threading.Event()

    @contextmanager
    def hang(_large: bool) -> Iterator[None]:
        if hangs.is_set():
            here.set()
            go.wait(WAIT)
        yield

    with Rig(space, one_at_a_time=hang) as rig:
        parts = Parts(rig)
        assert parts.check()
        rig.wait_for_turn()
        hangs.set()
        try:
            assert parts.check(), "it has been asked only now"
            assert here.wait(WAIT)
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
        parts.vm.probe = rig.pump.probe
        client = rig.open()
        client.sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.send(bytes(4000))
        rig.wait(lambda streams: streams.stdin_held > 0, "the VM takes nothing")
        for _ in range(3):
            assert parts.check()
            rig.wait_for_turn()


@pytest.mark.parametrize("call", ["open", "pwritev", "sendfile", "close"])
def test_pump_that_the_disk_keeps_waiting_is_said_and_is_no_reason_to_end_the_daemon(
    parts: Parts, rig: Rig, logged: Logged, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    here, go = threading.Event(), threading.Event()
    real = getattr(os, call)

    def hang(*arguments: object) -> object:
        if threading.current_thread().name.startswith("pump"):
            here.set()
            go.wait(WAIT)
        return real(*arguments)

    monkeypatch.setattr(os, call, hang)
    stream = rig.open(buffer=4_608)
    sent = frame(stream.base, bytes(5_000)) * 4
    rig.io.sendall(sent)
    received = b""
    if call in {"sendfile", "close"}:
        rig.wait(lambda streams: streams.spooled > 0, "output is spooled")
        received = read_now(stream.sock)
    while call == "close" and not here.wait(0.001):
        received += read_now(stream.sock)
    assert here.wait(WAIT)
    try:
        for _ in range(3):
            assert parts.check()
        assert logged.fields("the spool's disk does not answer") == [{"vm": "vm"}] * 2
        assert not stuck(logged)
    finally:
        go.set()
    assert received + read_exact(stream.sock, len(sent) - len(received)) == sent
    rig.wait_for_turn()
    assert parts.check()


def test_pump_that_has_not_begun_or_has_ended_is_well(parts: Parts, space: SpoolSpace) -> None:
    with Rig(space, started=False) as rig:
        parts.vm.probe = rig.pump.probe
        assert parts.check()
        assert parts.check()
        rig.pump.start()
        rig.pump.abort()
        assert rig.pump.join(WAIT)
        assert parts.check()
        assert parts.check()


def test_locks_that_are_not_given_back(parts: Parts, logged: Logged) -> None:
    parts.server.roster.is_free = parts.registry.is_free = lambda timeout: False
    assert not parts.check()
    assert stuck(logged) == [{"stuck": ["the lock of the connections", "the lock of the VMs"]}]
    parts.server.roster.is_free = parts.registry.is_free = lambda timeout: True
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
