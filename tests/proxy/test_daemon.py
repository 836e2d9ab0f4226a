"""In which order the daemon stops, and that it gives up when its time is over."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import cast

import pytest

from cc_proxy.proxy import daemon
from cc_proxy.proxy.registry import Registry
from cc_proxy.proxy.server import Server
from tests.proxy.conftest import Logged


class Stop:
    """Everything that is stopped, and the clock; notes in which order and with how much time."""

    def __init__(self, **takes: float) -> None:
        self.now = 1_000.0
        self.takes = takes
        self.ends: dict[str, float] = {}
        self.steps: list[str] = []
        self.listed = [FakeVm(self, name) for name in takes if name.startswith("vm")]

    def monotonic(self) -> float:
        return self.now

    def begin(self, what: str) -> None:
        """It takes as long as it takes, whatever is waited for meanwhile."""
        self.ends.setdefault(what, self.now + self.takes.get(what, 0.0))

    def wait(self, what: str, most: float) -> bool:
        """Returns whether it has ended."""
        assert most >= 0
        self.now = min(max(self.now, self.ends[what]), self.now + most)
        return self.ends[what] <= self.now

    def stop_accepting(self) -> None:
        self.steps.append("stop accepting")
        self.now += self.takes.get("accepted", 0.0)

    def join_connections(self, timeout: float) -> bool:
        self.steps.append("join connections")
        self.begin("connections")
        return self.wait("connections", timeout)

    def hang_up(self) -> None:
        self.steps.append("hang up")

    def vms(self) -> list[FakeVm]:
        self.steps.append("vms")
        return self.listed


class FakeVm:
    def __init__(self, stop: Stop, name: str) -> None:
        self.container_id = name
        self._stop = stop
        self._aborted = False

    def stop(self) -> None:
        self._stop.steps.append(f"stop {self.container_id}")
        self._stop.begin(self.container_id)

    def join(self, timeout: float) -> bool:
        return self._aborted or self._stop.wait(self.container_id, timeout)

    def abort(self) -> None:
        self._aborted = True
        self._stop.steps.append(f"abort {self.container_id}")


def run(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that it took."""
    monkeypatch.setattr(daemon, "time", SimpleNamespace(monotonic=stop.monotonic))
    begun = stop.now
    daemon._stop(cast(Server, stop), cast(Registry, stop))
    return stop.now - begun


def test_requests_finish_before_vms_are_stopped(monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    """A hello that is answered at the last moment is stopped too, and all of them at once."""
    stop = Stop(connections=1.0, vm1=0.5, vm2=0.5)
    assert run(stop, monkeypatch) == 1.5
    assert stop.steps == [
        "stop accepting",
        "join connections",
        "vms",
        "stop vm1",
        "stop vm2",
        "join connections",
        "hang up",
        "abort vm1",
        "abort vm2",
    ]
    assert logged.at(logging.WARNING) == []


@pytest.mark.parametrize(
    ("takes", "left"),
    [
        ({"vm1": 60.0, "vm2": 0.0}, ["vm1"]),
        ({"connections": 60.0, "vm1": 0.0, "vm2": 1.1}, ["vm2"]),
        ({"connections": 4.0, "vm1": 0.9, "vm2": 1.1}, ["vm2"]),
    ],
)
def test_after_5_seconds_it_gives_up(
    monkeypatch: pytest.MonkeyPatch, logged: Logged, takes: dict[str, float], left: list[str]
) -> None:
    stop = Stop(**takes)
    assert run(stop, monkeypatch) <= daemon.STOP_TIMEOUT + 1.0
    assert {"abort vm1", "abort vm2"} <= set(stop.steps)
    assert logged.fields("stopped with output undelivered") == [{"vms": left}]


@pytest.mark.parametrize("accepted", [0.0, 2.0, 4.5, 60.0])
def test_what_vms_have_sent_has_its_time_however_long_connections_take(
    monkeypatch: pytest.MonkeyPatch, logged: Logged, accepted: float
) -> None:
    stop = Stop(accepted=accepted, connections=60.0, vm1=0.99)
    assert run(stop, monkeypatch) == pytest.approx(max(4.0, accepted) + 0.99)
    assert logged.at(logging.WARNING) == []
