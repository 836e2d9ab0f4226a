"""What the main thread does: signals, the service manager, and the end, in order and in time."""

from __future__ import annotations

import logging
import pwd
import signal
import socket
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cc_proxy.access import Access, UserId
from cc_proxy.linux.systemd import Notifier
from cc_proxy.log.writing import Logging
from cc_proxy.proxy import daemon, ending
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.daemon import Host, Supervisor
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import LiveSettings, Settings
from tests.clock import Clock
from tests.proxy.conftest import Logged
from tests.wire.support import WAIT


class Stop(Clock):
    """Everything that is stopped, and the clock; notes in which order and with how much time."""

    def __init__(self, **takes: float) -> None:
        super().__init__()
        self.takes = takes
        self.ends: dict[str, float] = {}
        self.steps: list[str] = []
        self.listed = [FakeVm(self, name) for name in takes if name.startswith("vm")]

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

    @property
    def roster(self) -> Stop:
        return self

    def wait_until_empty(self, timeout: float) -> bool:
        self.steps.append("wait for connections")
        self.begin("connections")
        return self.wait("connections", timeout)

    def shut_down(self, how: int) -> None:
        assert how == socket.SHUT_RDWR
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
    stop.rule(monkeypatch, ending)
    begun = stop.now
    ending.stop(cast(Server, stop), cast(Registry, stop))
    return stop.now - begun


def test_requests_finish_before_vms_are_stopped(monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    """A hello that is answered at the last moment is stopped too, and all of them at once."""
    stop = Stop(connections=1.0, vm1=0.5, vm2=0.5)
    assert run(stop, monkeypatch) == 1.5
    assert stop.steps == [
        "stop accepting",
        "wait for connections",
        "vms",
        "stop vm1",
        "stop vm2",
        "wait for connections",
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
    assert run(stop, monkeypatch) <= ending.STOP_TIMEOUT + 1.0
    assert {"abort vm1", "abort vm2"} <= set(stop.steps)
    assert logged.fields("stopped with output undelivered") == [{"vms": left}]


@pytest.mark.parametrize("accepted", [0.0, 2.0, 4.5, 60.0])
def test_what_vms_have_sent_has_its_time_however_long_connections_take(
    monkeypatch: pytest.MonkeyPatch, logged: Logged, accepted: float
) -> None:
    stop = Stop(accepted=accepted, connections=60.0, vm1=0.99)
    assert run(stop, monkeypatch) == pytest.approx(max(4.0, accepted) + 1.0)
    assert logged.at(logging.WARNING) == []


class Manager:
    """A service manager that takes what it is told, or does not; it has the daemon's log too."""

    wanted = True
    watchdog = 1.0
    error = "Resource temporarily unavailable"

    def __init__(self) -> None:
        self.deaf = False
        self.told: list[tuple[str, ...]] = []

    def tell(self, *assignments: str, wait: bool = True) -> bool:
        if not self.deaf:
            self.told.append(assignments)
        return not self.deaf

    def report_suppressed(self) -> None:
        pass

    def set_level(self, level: str) -> None:
        assert level == "info"


class Desk(Clock):
    """What the main thread sees of everything else."""

    own = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.manager = Manager()
        self.new = Settings(access=Access(users=(UserId(54_321),)))
        self.listed: list[SimpleNamespace] = []
        self.signals: list[signal.Signals] = []
        self.failure: BaseException | None = None
        self.open_to_all: list[bool] = []
        self.answers = threading.Event()  # whether files and name services do
        self.answers.set()
        self.rule(monkeypatch, daemon)
        monkeypatch.setattr(daemon, "_next_signal", self.next_signal)
        monkeypatch.setattr(daemon, "_wake", lambda: self.signals.insert(0, signal.SIGALRM))
        monkeypatch.setattr(signal, "setitimer", lambda *_: None)
        me: Any = self
        host = Host(
            self.read_settings, str, cast(Notifier, self.manager), cast(Logging, self.manager), me, me
        )
        self.supervisor = Supervisor(LiveSettings(Settings()), host, me, me, me)

    def next_signal(self) -> signal.Signals:
        """The next, once what is read has been read, unless nothing will be."""
        for thread in threading.enumerate():
            if thread.name == "settings" and self.answers.is_set():
                thread.join(WAIT)
        return self.signals.pop(0)

    def read_settings(self) -> Settings:
        assert self.answers.wait(WAIT)
        if self.failure:
            raise self.failure
        return self.new

    def open_to(self, *, for_all: bool) -> None:
        self.open_to_all.append(for_all)

    def look_after(self) -> None:
        pass

    def keep_daemon(self) -> None:
        pass

    def is_free(self, _timeout: float) -> bool:
        return True

    def vms(self) -> list[SimpleNamespace]:
        return self.listed

    def check(self, _patience: float) -> bool:
        return True

    def work(self, *signals: signal.Signals) -> list[str]:
        """Have those dealt with; returns what the manager was told."""
        del self.manager.told[:]
        self.signals = [*signals, signal.SIGTERM]
        assert self.supervisor.run() is signal.SIGTERM
        return [assignment for told in self.manager.told[1:] for assignment in told]


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


READY = ["READY=1", "STATUS=0 VMs, 0 sessions"]


@pytest.mark.parametrize("failure", [MemoryError(), KeyError("nobody expects it")])
def test_error_in_the_main_thread_costs_nothing_but_what_it_was_at(
    desk: Desk, logged: Logged, failure: Exception
) -> None:
    desk.failure = failure
    assert desk.work(signal.SIGHUP)[-2:] == READY, "or the manager would wait for the end of the reload"
    assert logged.at(logging.ERROR) == ["settings not reloaded: the old ones stay"]
    desk.failure = None
    assert desk.work(signal.SIGHUP)[-2:] == READY
    assert logged.at(logging.INFO)[-1] == "settings reloaded"


def test_settings_that_cannot_be_read_hold_nobody_up(desk: Desk, logged: Logged) -> None:
    """As from a network file system that hangs."""
    desk.answers.clear()
    told = desk.work(signal.SIGHUP, signal.SIGALRM, signal.SIGHUP, signal.SIGHUP)
    assert told[0] == "RELOADING=1"
    assert "READY=1" not in told
    desk.now += 1.0
    assert "WATCHDOG=1" in desk.work(signal.SIGALRM)
    assert sum(thread.name == "settings" for thread in threading.enumerate()) == 1
    assert (
        logged.at(logging.WARNING)
        == ["the settings are still being read: they are read again after that"] * 2
    )
    desk.answers.set()
    assert desk.work().count("READY=1") == 2, "the first reading, and one for the later signals"
    assert logged.at(logging.INFO).count("settings reloaded") == 2


def test_names_that_nobody_knew_are_looked_up_again(
    desk: Desk, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.new = Settings(access=Access(users=(UserId.resolve("later"),)))
    desk.work(signal.SIGHUP)
    assert logged.fields("[access] names users or groups that nobody knows so far") == [{"names": ["later"]}]
    desk.now += 60.0
    desk.work(signal.SIGALRM)
    assert logged.at(logging.INFO).count("settings reloaded") == 1, "they are the same"
    monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_uid={"later": 54_321}[name]))
    desk.work(signal.SIGALRM)
    assert logged.at(logging.INFO).count("settings reloaded") == 1, "it is too early"
    desk.now += 60.0
    desk.work(signal.SIGALRM)
    assert logged.fields("settings reloaded")[-1] == {"changed": {"access.users": (("later",), (54_321,))}}


def test_settings_that_name_others_open_the_socket(desk: Desk) -> None:
    desk.work(signal.SIGHUP)
    assert desk.open_to_all == [True]


def test_what_a_manager_did_not_take_it_is_told_again(desk: Desk, logged: Logged) -> None:
    desk.manager.deaf = True
    desk.listed = [SimpleNamespace(sessions=2)]
    for _ in range(3):
        desk.now += 1.0
        assert desk.work(signal.SIGALRM) == []
    assert logged.at(logging.WARNING) == ["the service manager cannot be told"], "once"
    desk.manager.deaf = False
    assert desk.work(signal.SIGALRM) == ["WATCHDOG=1"], "of its status it has heard with READY=1"
    desk.now += 1.0
    desk.listed = []
    assert desk.work(signal.SIGALRM, signal.SIGALRM) == ["WATCHDOG=1"]
    desk.manager.deaf = True
    desk.work()
    assert len(logged.at(logging.WARNING)) == 2


def test_signal_that_says_stop_comes_before_others() -> None:
    """As if ticks came as fast as they are dealt with.

    Which of several signals comes next is seen here alone: a daemon that stops does not say what it left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, daemon._SIGNALS)
    try:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert [daemon._next_signal() for _ in range(3)] == [
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGALRM,
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
