"""Ids and the VMs behind them: who gets one, how many there may be, and when one is free again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from cc_proxy.api.payloads import Hello
from cc_proxy.continuity.cells import State
from cc_proxy.linux.credentials import Credentials
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.users import LimitReached, User
from cc_proxy.proxy.vms.dialer import Dialer
from cc_proxy.proxy.vms.registry import Registry, RegistryError
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import Limits, LiveSettings, Settings, SpoolSettings, VmSettings
from tests.connector import CONNECTOR
from tests.faults import broken
from tests.locks import lock_of
from tests.proxy.conftest import Logged
from tests.proxy.support import new_user
from tests.users import ROOT
from tests.wire.support import READY, WAIT, FakeVm, at_end, frame, in_background, is_silent, wait_until

LIMIT = 3
ME = Credentials.own()


class Office:
    """A registry, and agents that VMs are registered for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._count = 0
        self.registry = Registry(
            LiveSettings(
                Settings(
                    vm=VmSettings(ready_timeout=60, ready_ping_after=50, bye_linger=3_600),
                    limits=Limits(vms=LIMIT),
                    spool=SpoolSettings(directory=str(directory)),
                )
            ),
            CONNECTOR,
        )

    def agent(self) -> FakeVm:
        self._count += 1
        agent = FakeVm(self._directory, f"vm{self._count}")
        self._stack.callback(agent.close)
        return agent

    def register(
        self, name: str, agent: FakeVm | None = None, *, client_goes: bool = False
    ) -> tuple[Vm, FakeVm]:
        agent = agent or self.agent()

        def say_ready() -> None:
            agent.accept()
            if client_goes:
                here.clear()
            agent.say(READY)

        here = threading.Event()
        here.set()
        with in_background(say_ready):
            vm = self.registry.register(hello(name, agent), ME, here.is_set)
        return vm, agent

    def knows(self, name: str) -> bool:
        try:
            self.registry.get(name, ME)
        except RegistryError:
            return False
        return True

    def close(self) -> None:
        vms = self.registry.vms()
        for vm in vms:
            vm.abort()
        for vm in vms:
            assert vm.join(WAIT)
        self._stack.close()


def hello(name: str, agent: FakeVm) -> Hello:
    return Hello(name, str(agent.ctl_path), str(agent.io_path))


@pytest.fixture
def office(tmp_sock_dir: Path) -> Iterator[Office]:
    office = Office(tmp_sock_dir)
    yield office
    office.close()


def test_registered_vm_is_found_until_bye(office: Office, logged: Logged) -> None:
    assert not office.knows("pod")
    vm, _ = office.register("pod")
    assert office.registry.get("pod", ME) is vm
    office.registry.unregister("pod", ME)
    assert not office.knows("pod")
    with pytest.raises(RegistryError, match="unknown containerID: pod"):
        office.registry.unregister("pod", ME)
    assert office.registry.vms() == [vm], "it lingers"
    assert logged.fields("VM registered") == [{"vm": "pod", "uid": ME.uid}]
    assert logged.fields("VM unregistered") == [{"vm": "pod"}]


def test_id_is_taken_as_soon_as_hello_begins_and_not_to_be_attached_to_before_it_is_over(
    office: Office,
) -> None:
    agent = office.agent()
    results: list[Vm] = []
    with in_background(lambda: results.append(office.registry.register(hello("pod", agent), ME))):
        agent.accept()
        with pytest.raises(RegistryError, match="pod: container already registered"):
            office.registry.register(hello("pod", office.agent()), ME)
        assert not office.knows("pod")
        with pytest.raises(RegistryError, match="unknown containerID: pod"):
            office.registry.unregister("pod", ME)
        agent.say(READY)
    assert office.registry.get("pod", ME) is results[0]


def test_of_many_hellos_for_one_id_one_wins_and_the_others_dial_nothing(office: Office) -> None:
    agents = [office.agent() for _ in range(8)]
    barrier = threading.Barrier(8)
    winners: list[FakeVm] = []
    refusals: list[str] = []

    def register(agent: FakeVm) -> None:
        barrier.wait(WAIT)
        try:
            office.registry.register(hello("pod", agent), ME)
        except RegistryError as error:
            refusals.append(str(error))
        else:
            winners.append(agent)

    def answer() -> None:
        wait_until(lambda: any(not is_silent(agent.listeners[1]) for agent in agents), "one is dialled")
        (chosen,) = (agent for agent in agents if not is_silent(agent.listeners[1]))
        chosen.accept()
        chosen.say(READY)

    with ExitStack() as stack:
        for agent in agents:
            stack.enter_context(in_background(partial(register, agent)))
        stack.enter_context(in_background(answer))
    (winner,) = winners
    assert refusals == ["pod: container already registered"] * 7
    assert all(agent.was_not_dialled() for agent in agents if agent is not winner)
    assert len(office.registry.vms()) == 1


def test_failed_hello_frees_the_id(office: Office) -> None:
    for _ in range(LIMIT + 2):
        with pytest.raises(VmError, match="Not a directory"):
            office.registry.register(Hello("pod", "/dev/null/ctl", "/dev/null/io"), ME)
        assert office.registry.vms() == []
    office.register("pod")


def test_hello_that_fails_in_a_way_nobody_expects_frees_the_id(office: Office) -> None:
    with broken(Dialer, "connect"), pytest.raises(KeyError):
        office.registry.register(hello("pod", office.agent()), ME)
    assert office.registry.vms() == []
    office.register("pod")


@pytest.mark.parametrize("thing", ["vms", "request_bytes"])
def test_hello_that_there_is_no_memory_for_leaves_nothing(office: Office, thing: str) -> None:
    full = broken(User, "charge", MemoryError(), when=lambda _, what, *__: what == thing)
    with full, pytest.raises(MemoryError):
        office.registry.register(hello("pod", office.agent()), ME)
    assert office.registry.vms() == []
    assert office.registry.users.all() == []
    office.register("pod")


def test_who_fails_often_takes_the_place_of_nobody_elses_failures(office: Office) -> None:
    """A user with a hundred failed VMs has no more of them forgotten than its own."""
    agent = office.agent()
    agent.ctl_path.unlink()
    alice, bob = Credentials(ME.pid, 1, 1), Credentials(ME.pid, 2, 2)
    for who, number in ((bob, 3), (alice, 100)):
        for count in range(number):
            with pytest.raises(VmError):
                office.registry.register(hello(f"{who.uid} {count}", agent), who)
    ids = [failed.container_id for failed in office.registry.failed(ROOT)]
    assert len(ids) == 32
    assert ids[:2] == ["1 99", "1 98"]
    assert ids[-3:] == ["2 2", "2 1", "2 0"]


def test_no_more_vms_than_the_settings_allow_the_lingering_ones_included(office: Office) -> None:
    agents = [office.register(f"pod{number}")[1] for number in range(LIMIT)]
    office.registry.unregister("pod0", ME)
    late = office.agent()
    for name in ("pod0", "late"):
        with pytest.raises(LimitReached, match=f"the limit of {LIMIT} VMs is reached"):
            office.registry.register(hello(name, late), ME)
        assert not office.knows(name)
    assert late.was_not_dialled()
    agents[0].hang_up()
    wait_until(lambda: len(office.registry.vms()) < LIMIT, "it has ended")
    office.register("late", late)


def test_id_is_used_again_while_the_old_vm_lingers(office: Office) -> None:
    old, old_agent = office.register("pod")
    base, client = old.open_session(1, new_user())
    with client:
        client.settimeout(WAIT)
        office.registry.unregister("pod", ME)
        new, new_agent = office.register("pod")
        assert office.registry.get("pod", ME) is new
        assert set(office.registry.vms()) == {old, new}
        old_agent.send_frame(base, b"still delivered")
        assert client.recv(100) == frame(base, b"still delivered")
        old_agent.hang_up()
        assert at_end(client)
    wait_until(lambda: office.registry.vms() == [new], "the old one has ended")
    assert office.registry.get("pod", ME) is new, "which does not free the id of the new one"
    assert is_silent(new_agent.ctl)


@pytest.mark.parametrize("channel", ["ctl", "io"])
def test_lost_vm_keeps_its_id_until_hello_takes_it_over(office: Office, channel: str) -> None:
    vm, agent = office.register("pod")
    getattr(agent, channel).close()
    wait_until(lambda: vm.life.is_gone, "it is lost")
    assert office.registry.get("pod", ME) is vm
    again, _ = office.register("pod")
    assert office.registry.get("pod", ME) is again
    wait_until(lambda: vm not in office.registry.vms(), "it has ended")
    assert office.registry.get("pod", ME) is again


def test_hello_that_fails_leaves_the_id_to_the_vm_that_has_gone(office: Office) -> None:
    vm, agent = office.register("pod")
    agent.hang_up()
    wait_until(lambda: vm.life.state is State.GONE, "it has gone")
    with pytest.raises(VmError, match="not an absolute path"):
        office.registry.register(Hello("pod", "relative", "/x"), ME)
    assert office.registry.get("pod", ME) is vm


def test_vm_whose_client_went_while_it_booted_is_let_go_and_its_id_is_free(office: Office) -> None:
    vm, agent = office.register("pod")
    agent.hang_up()
    wait_until(lambda: vm.life.state is State.GONE, "it has gone")
    with pytest.raises(VmError, match="nobody waits for it any more"):
        office.register("pod", client_goes=True)
    assert office.registry.get("pod", ME) is vm, "a hello that fails changes nothing"
    with pytest.raises(VmError, match="nobody waits for it any more"):
        office.register("another", client_goes=True)
    assert {vm.life.state for vm in office.registry.vms()} <= {State.LEAVING}, "unless it was given up before"
    assert not office.knows("another")
    office.register("another")


def test_vm_that_nobody_waits_for_any_more_is_given_up_at_once(office: Office) -> None:
    """Its id and its sockets are free for the next hello."""
    agent, here = office.agent(), threading.Event()
    here.set()

    def leave() -> None:
        agent.accept()
        here.clear()

    with in_background(leave), pytest.raises(VmError, match="nobody waits for it any more"):
        office.registry.register(hello("pod", agent), ME, here.is_set)
    assert agent.is_hung_up()
    agent.hang_up()
    office.register("pod", agent)


def test_id_of_a_vm_that_has_gone_is_free_after_bye(office: Office) -> None:
    vm, agent = office.register("pod")
    agent.hang_up()
    wait_until(lambda: vm.life.state is State.GONE, "it has gone")
    assert office.registry.vms_of(ME) == [vm]
    office.registry.unregister("pod", ME)
    assert not office.knows("pod")
    assert office.registry.vms_of(ME) == []
    with pytest.raises(RegistryError, match="unknown containerID: pod"):
        office.registry.unregister("pod", ME)


STRANGER = Credentials(ME.pid, 54_321, 54_321)


def test_nobody_else_takes_over_the_id_of_a_vm_that_has_gone(office: Office) -> None:
    """A client that attaches by name trusts the name."""
    vm, agent = office.register("pod")
    agent.hang_up()
    wait_until(lambda: vm.life.state is State.GONE, "it has gone")
    other = office.agent()
    with pytest.raises(RegistryError, match="pod: container already registered"):
        office.registry.register(hello("pod", other), STRANGER)
    assert other.was_not_dialled()
    with pytest.raises(RegistryError, match="unknown containerID: pod"):
        office.registry.unregister("pod", STRANGER)
    assert office.registry.get("pod", ME) is vm


def test_no_more_ids_are_kept_than_there_may_be_vms(office: Office) -> None:
    for number in range(LIMIT + 2):
        vm, agent = office.register(f"pod{number}")
        agent.hang_up()
        wait_until(lambda vm=vm: vm.life.state is State.GONE, "it has gone")  # type: ignore[misc]
        wait_until(lambda vm=vm: vm not in office.registry.vms(), "and forgotten as a VM")  # type: ignore[misc]
    known = [number for number in range(LIMIT + 2) if office.knows(f"pod{number}")]
    assert known == list(range(2, LIMIT + 2)), "the oldest are forgotten first"


def test_an_id_that_nobody_in_the_field_has_is_not_kept(office: Office) -> None:
    vm, agent = office.register("x" * 5_000)
    agent.hang_up()
    wait_until(lambda: vm not in office.registry.vms(), "it has gone")
    assert not office.knows("x" * 5_000)


def test_vm_that_is_lost_as_it_comes_up_keeps_its_id(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pump.start

    def start_and_hang_up(pump: Pump) -> None:
        real(pump)
        agent.ctl.shutdown(socket.SHUT_RDWR)

    agent = office.agent()
    monkeypatch.setattr(Pump, "start", start_and_hang_up)
    try:
        vm, _ = office.register("pod", agent)
    except VmError:  # the end was seen before it was up
        assert not office.knows("pod")
    else:
        wait_until(lambda: vm.life.is_gone, "it is lost")
        assert office.knows("pod")
    wait_until(lambda: office.registry.vms() == [], "it has ended")


def test_bye_and_the_end_at_once_count_once(office: Office) -> None:
    for number in range(10):
        vm, agent = office.register(f"pod{number}")
        with in_background(agent.hang_up):
            office.registry.unregister(f"pod{number}", ME)
        assert vm.join(WAIT)
        wait_until(lambda vm=vm: vm not in office.registry.vms(), "it has gone")  # type: ignore[misc]
    assert office.registry.users.all() == []


def test_hello_and_bye_from_many_threads(office: Office) -> None:
    def live(name: str) -> None:
        for _ in range(15):
            vm, agent = office.register(name)
            assert office.registry.get(name, ME) is vm
            office.registry.unregister(name, ME)
            agent.hang_up()
            assert vm.join(WAIT)
            wait_until(lambda vm=vm: vm not in office.registry.vms(), "it has ended")  # type: ignore[misc]

    with ExitStack() as stack:
        for name in ("one", "two", "three"):
            stack.enter_context(in_background(partial(live, name)))
    assert office.registry.vms() == []


# What the watchdog looks at -------------------------------------------------------------------------------


def test_lock_is_free_unless_somebody_holds_it(office: Office) -> None:
    assert office.registry.is_free(WAIT)
    with lock_of(office.registry):
        assert not office.registry.is_free(0.01)


def test_vm_answers_probes(office: Office) -> None:
    vm, _ = office.register("a")
    assert office.registry.vms() == [vm]
    for _ in range(3):
        wait_until(vm.probe, "it has answered")
