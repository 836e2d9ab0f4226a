"""Commands that are not answered, answered late, or cut off (docs/protocol.md, 2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    ACK,
    ERROR,
    HYPERSTART_ERROR,
    NEXT,
    OK,
    READY,
    FakeVm,
    command,
    error_of,
    is_silent,
    unread_by_peer,
    wait_until,
)


def test_command_without_an_answer_fails_in_time(hasty: Wire) -> None:
    pod = hasty.pod()
    pod.client.hyper("destroypod")
    pod.vm.read_command()
    assert "ERROR received" not in error_of(pod.client.receive())
    assert hasty.is_registered(pod.container)


def test_events_do_not_prolong_the_deadline(hasty: Wire) -> None:
    pod = hasty.pod()
    pod.client.hyper("destroypod")
    pod.vm.read_command()
    while is_silent(pod.client.sock):
        pod.vm.say(NEXT, b"\0\0\0\1")
    error_of(pod.client.receive())


@pytest.mark.parametrize("late", [ACK, ERROR])
def test_late_answer_belongs_to_its_own_command(hasty: Wire, late: int) -> None:
    pod = hasty.pod()
    pod.client.hyper("ping", '"first"')
    assert pod.vm.read_command().payload == b'"first"'
    error_of(pod.client.receive())
    pod.client.hyper("ping", '"second"')
    pod.vm.say(late)
    assert pod.vm.read_command().payload == b'"second"'
    other = {ACK: ERROR, ERROR: ACK}[late]
    pod.vm.say(other)
    assert pod.client.receive() == {ACK: OK, ERROR: HYPERSTART_ERROR}[other]


def test_late_answer_between_commands_belongs_to_its_own_command(hasty: Wire) -> None:
    pod = hasty.pod()
    pod.client.hyper("ping", '"first"')
    pod.vm.read_command()
    error_of(pod.client.receive())
    pod.vm.say(NEXT, b"\0\0\0\1")
    pod.vm.say(ERROR, b"late")
    for _ in range(3):
        assert pod.pings()


def test_late_answers_of_several_commands_belong_to_each(hasty: Wire) -> None:
    """Whether the second is sent while the first is not answered is the proxy's affair."""
    pod = hasty.pod()
    for number in (1, 2):
        pod.client.hyper("ping", str(number))
        error_of(pod.client.receive())
    assert pod.vm.read_command().payload == b"1"
    pod.vm.say(ERROR, b"one")
    pod.client.hyper("ping", "3")
    while (payload := pod.vm.read_command().payload) != b"3":
        assert payload == b"2"
        pod.vm.say(ERROR, b"two")
    pod.vm.say(ACK)
    assert pod.client.receive() == OK


def test_hung_command_does_not_block_the_vms_others_for_ever(hasty: Wire) -> None:
    pod = hasty.pod()
    clients = [hasty.attached(pod) for _ in range(4)]
    for client in clients:
        client.hyper("destroypod")
    for client in clients:
        error_of(client.receive())
    stream = pod.client.allocate()
    pod.vm.send_frame(stream.base, b"still here")
    assert stream.read_frame().payload == b"still here"


def test_client_that_goes_while_its_command_runs_leaves_the_answer_to_nobody(wire: Wire) -> None:
    pod = wire.pod()
    gone = wire.attached(pod)
    gone.hyper("ping", '"gone"')
    assert pod.vm.read_command().payload == b'"gone"'
    gone.close()
    pod.client.hyper("ping", '"here"')
    pod.vm.say(ERROR, b"for who is gone")
    assert pod.vm.acknowledge().payload == b'"here"'
    assert pod.client.receive() == OK


def test_client_that_does_not_wait_for_the_response_is_normal(wire: Wire) -> None:
    pod = wire.pod()
    shim = wire.attached(pod)
    shim.hyper("destroypod", '""')
    assert pod.vm.read_command() == (4, b'""')
    shim.close()
    pod.vm.say(ACK)
    assert pod.pings()


@pytest.mark.parametrize("stray", [ACK, ERROR])
def test_answer_that_nobody_waits_for_is_not_the_next_commands(wire: Wire, stray: int) -> None:
    pod = wire.pod()
    pod.vm.say(stray, b"stray")
    wait_until(lambda: unread_by_peer(pod.vm.ctl) == 0, "it is read before the command comes")
    pod.client.hyper("ping")
    pod.vm.read_command()
    pod.vm.say(NEXT, b"\0\0\0\1")
    other = {ACK: ERROR, ERROR: ACK}[stray]
    pod.vm.say(other)
    assert pod.client.receive() == {ACK: OK, ERROR: HYPERSTART_ERROR}[other]


def both_closed(vm: FakeVm) -> None:
    vm.hang_up()


def ctl_closed(vm: FakeVm) -> None:
    vm.ctl.close()


def io_closed(vm: FakeVm) -> None:
    vm.io.close()


def closed_in_a_header(vm: FakeVm) -> None:
    vm.ctl.sendall(command(ACK)[:5])
    vm.ctl.close()


def closed_in_an_answer(vm: FakeVm) -> None:
    vm.ctl.sendall(command(ACK, b"x", length=100))
    vm.ctl.close()


def event_then_closed(vm: FakeVm) -> None:
    vm.say(READY)
    vm.say(NEXT, b"\0\0\0\1")
    vm.ctl.close()


def length_0(vm: FakeVm) -> None:
    vm.ctl.sendall(command(ACK, length=0))


def length_4(vm: FakeVm) -> None:
    vm.ctl.sendall(command(ACK, length=4))


def length_7(vm: FakeVm) -> None:
    vm.ctl.sendall(command(ACK, length=7))


def length_2_gib(vm: FakeVm) -> None:
    vm.ctl.sendall(command(ERROR, length=2**31))


def length_4_gib(vm: FakeVm) -> None:
    vm.ctl.sendall(command(NEXT, length=2**32 - 1))


def malformed_event(vm: FakeVm) -> None:
    vm.ctl.sendall(command(NEXT, length=3) + command(ACK))


LOST = [
    both_closed,
    ctl_closed,
    io_closed,
    closed_in_a_header,
    closed_in_an_answer,
    event_then_closed,
    length_0,
    length_4,
    length_7,
    length_2_gib,
    length_4_gib,
    malformed_event,
]


@pytest.mark.parametrize("step", LOST)
def test_vm_lost_in_the_middle_of_a_command_fails_it_and_frees_the_id(
    wire: Wire, step: Callable[[FakeVm], None]
) -> None:
    pod, other = wire.pod(), wire.pod()
    stream = pod.open()
    waiting = wire.attached(pod)
    pod.client.hyper("ping")
    pod.vm.read_command()
    waiting.hyper("ping")
    step(pod.vm)
    assert "ERROR received" not in error_of(pod.client.receive())
    error_of(waiting.receive())
    assert stream.at_end()
    wire.wait_unregistered(pod.container)
    assert other.pings()
    assert wire.pod(container=pod.container).pings()


@pytest.mark.parametrize("step", [length_7, length_4_gib, malformed_event, ctl_closed])
def test_vm_lost_without_a_command_frees_the_id_and_hangs_up(
    wire: Wire, step: Callable[[FakeVm], None]
) -> None:
    pod = wire.pod()
    stream = pod.open()
    step(pod.vm)
    assert stream.at_end()
    wire.wait_unregistered(pod.container)
    assert pod.vm.io.recv(1) == b""
    error_of(pod.client.ask("hyper", {"hyperName": "ping"}))
    error_of(pod.client.ask("allocateIO", {"nStreams": 1}))


def test_command_to_a_vm_that_reads_nothing_more_fails_in_time(hasty: Wire) -> None:
    pod = hasty.pod()
    pod.client.hyper("writefile", '"' + "a" * 10_000 + '"')
    error_of(pod.client.receive())
    assert hasty.is_registered(pod.container)
