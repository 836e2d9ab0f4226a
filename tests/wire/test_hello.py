"""hello registers a VM (docs/protocol.md, 1 and 2)."""

from __future__ import annotations

import time

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    ACK,
    ASYNC_EVENT,
    ERROR,
    FINISHCMD,
    FINISHPOD,
    GETVERSION,
    HYPERSTART_ERROR,
    NEXT,
    NOT_ATTACHED,
    OK,
    PING,
    QUESTIONS,
    READY,
    VERSION_NUMBER,
    VERSIONED,
    FakeVm,
    RawClient,
    command,
    error_of,
    hello_data,
    in_pieces,
    is_silent,
    refused,
    request,
    wait_until,
)

MALFORMED = refused("malformed hello command")
FIELDS = ["containerId", "ctlSerial", "ioSerial"]


def saying_hello(wire: Wire) -> tuple[RawClient, FakeVm, str]:
    """A client that waits for a VM that has been connected to and has said nothing."""
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    vm.accept()
    return client, vm, container


def test_hello_is_answered_with_the_version_once_the_vm_said_ready(wire: Wire) -> None:
    client, vm, container = saying_hello(wire)
    assert not wire.is_registered("nobody")  # answered while hello waits
    assert is_silent(client.sock)
    vm.say(READY)
    assert client.receive() == VERSIONED
    assert wire.is_registered(container)


def test_ready_may_come_in_pieces(wire: Wire) -> None:
    client, vm, _ = saying_hello(wire)
    for piece in in_pieces(command(READY), 1):
        vm.ctl.sendall(piece)
    assert client.receive() == VERSIONED


def test_ready_may_come_before_the_proxy_connects_its_second_socket(wire: Wire) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    ctl, _ = vm.listeners[0].accept()
    with ctl:
        ctl.sendall(command(READY))
        assert client.receive() == VERSIONED


@pytest.mark.parametrize("stale", [True, False], ids=["refused", "missing"])
def test_vm_whose_sockets_are_not_there_yet_is_waited_for(wire: Wire, stale: bool) -> None:
    """Its hypervisor is about to start."""
    client, vm = wire.client(), wire.vm()
    for listener, path in zip(vm.listeners, (vm.ctl_path, vm.io_path), strict=True):
        listener.close()
        if not stale:
            path.unlink()
    client.hello(wire.new_id(), vm)
    assert not wire.is_registered("nobody")  # answered while hello waits
    assert is_silent(client.sock)
    vm.listen_again()
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED


def test_nothing_is_sent_to_a_vm_that_says_ready(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("getpod")
    assert pod.vm.acknowledge() == (2, b"")  # the first thing the VM ever reads
    assert pod.client.receive() == OK
    stream = pod.open()
    stream.send(b"hi")
    assert pod.vm.read_frame() == (stream.base, b"hi")


def test_the_client_is_attached_after_hello(wire: Wire) -> None:
    client = wire.client()
    assert client.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED
    pod = wire.pod(client)
    assert pod.pings()
    assert client.allocate().base == 1


@pytest.mark.parametrize("console", ["", "/nonexistent/console", "x" * 500])
def test_console_is_optional_and_need_not_be_there(wire: Wire, console: str) -> None:
    client, vm = wire.client(), wire.vm()
    client.send(request("hello", hello_data(wire.new_id(), vm) | {"console": console}))
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED


@pytest.mark.parametrize("change", ["empty", "absent"])
@pytest.mark.parametrize("field", FIELDS)
def test_empty_or_absent_field_is_malformed_and_nothing_is_dialled(
    wire: Wire, field: str, change: str
) -> None:
    client, vm = wire.client(), wire.vm()
    data = hello_data(wire.new_id(), vm)
    if change == "empty":
        data[field] = ""
    else:
        del data[field]
    assert client.ask("hello", data) == MALFORMED
    assert vm.was_not_dialled()
    assert client.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED


@pytest.mark.parametrize("data", [None, {}, dict.fromkeys(FIELDS, "")])
def test_all_fields_empty_or_absent_is_malformed(wire: Wire, data: object) -> None:
    assert wire.client().ask("hello", data) == MALFORMED


def test_second_hello_for_a_live_vm_is_refused_and_does_not_hang(wire: Wire) -> None:
    pod = wire.pod()
    taken = refused(f"{pod.container}: container already registered")
    again = wire.client()
    again.hello(pod.container, pod.vm)
    assert again.receive() == taken
    assert pod.vm.was_not_dialled()
    pod.client.hello(pod.container, pod.vm)
    assert pod.client.receive() == taken
    assert pod.pings()


def test_the_id_is_taken_from_the_moment_hello_starts(wire: Wire) -> None:
    client, vm, container = saying_hello(wire)
    second, other = wire.client(), wire.vm()
    second.hello(container, other)
    assert second.receive() == refused(f"{container}: container already registered")
    assert other.was_not_dialled()
    vm.say(READY)
    assert client.receive() == VERSIONED


def test_of_many_hellos_at_once_one_wins(wire: Wire) -> None:
    vm, container = wire.vm(), wire.new_id()
    clients = [wire.client() for _ in range(30)]
    for client in clients:
        client.hello(container, vm)
    vm.accept()
    waiting = set(clients)

    def all_but_one_answered() -> bool:
        for client in list(waiting):
            if not is_silent(client.sock):
                assert client.receive() == refused(f"{container}: container already registered")
                waiting.discard(client)
        return len(waiting) == 1

    wait_until(all_but_one_answered, "all but one are refused")
    assert vm.was_not_dialled()  # by any other
    vm.say(READY)
    assert waiting.pop().receive() == VERSIONED


def test_others_are_served_while_hello_waits(wire: Wire) -> None:
    pod = wire.pod()
    waiting = [saying_hello(wire) for _ in range(5)]
    other = wire.attached(pod)
    assert pod.pings(other)
    stream = other.allocate()
    pod.vm.send_frame(stream.base, b"out")
    assert stream.read_frame() == (stream.base, b"out")
    assert wire.pod().pings()
    for client, vm, _ in reversed(waiting):
        vm.say(READY)
        assert client.receive() == VERSIONED


def test_the_vm_stays_registered_when_the_client_that_said_hello_disconnects(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.close()
    other = wire.attached(pod)
    assert pod.pings(other)
    stream = other.allocate()
    pod.vm.send_frame(stream.base, b"out")
    assert stream.read_frame() == (stream.base, b"out")


def test_one_client_may_say_hello_for_several_vms_and_the_last_counts(wire: Wire) -> None:
    client = wire.client()
    first, second = wire.pod(client), wire.pod(client)
    assert second.pings()
    assert first.pings(wire.attached(first))


def test_refused_hello_leaves_the_client_attached_where_it_was(wire: Wire) -> None:
    pod, other = wire.pod(), wire.pod()
    pod.client.hello(other.container, other.vm)
    assert error_of(pod.client.receive())
    assert pod.client.ask("hello", dict.fromkeys(FIELDS, "relative"))
    assert pod.pings()


def test_late_ready_after_registration_is_an_event(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("ping")
    assert pod.vm.read_command().code == PING
    pod.vm.say(READY)
    pod.vm.say(ERROR)
    assert pod.client.receive() == HYPERSTART_ERROR


@pytest.mark.parametrize("code", [NEXT, ACK, ERROR, FINISHCMD, FINISHPOD, ASYNC_EVENT, 99])
def test_what_is_not_ready_does_not_count_as_ready(wire: Wire, code: int) -> None:
    client, vm, container = saying_hello(wire)
    vm.say(code, b"{}")
    vm.hang_up()
    assert error_of(client.receive())
    wire.wait_unregistered(container)


def test_events_before_ready_do_no_harm(wire: Wire) -> None:
    client, vm, _ = saying_hello(wire)
    events = [(NEXT, b"\0\0\0\10"), (ASYNC_EVENT, b'{"event":"x"}'), (FINISHPOD, b""), (READY, b"")]
    vm.ctl.sendall(b"".join(command(code, payload) for code, payload in events))
    assert client.receive() == VERSIONED


def test_vm_that_is_up_already_is_recognised_by_its_answers(hasty: Wire) -> None:
    start = time.monotonic()
    client, vm, container = saying_hello(hasty)
    first = vm.read_command()
    assert time.monotonic() - start >= 0.3  # ready_ping_after
    vm.say(NEXT, b"\0\0\0\10")
    vm.say(ACK, VERSION_NUMBER if first.code == GETVERSION else b"")
    vm.answer_questions(QUESTIONS - 1)
    assert client.receive() == VERSIONED
    assert hasty.is_registered(container)
    client.hyper("ping")
    vm.acknowledge()
    assert client.receive() == OK


def test_answers_of_a_vm_that_is_up_may_come_in_pieces(hasty: Wire) -> None:
    client, vm, _ = saying_hello(hasty)
    questions = [vm.read_command().code for _ in range(QUESTIONS)]
    answers = [command(ACK, VERSION_NUMBER if code == GETVERSION else b"") for code in questions]
    for piece in in_pieces(command(NEXT, b"\0\0\0\10") + b"".join(answers), 5):
        vm.ctl.sendall(piece)
    assert client.receive() == VERSIONED


@pytest.mark.parametrize("late", [[ACK], [ERROR], [ACK, ERROR, ACK], [ACK] * 20], ids=str)
def test_late_answers_to_somebody_else_are_taken_for_nobodys(hasty: Wire, late: list[int]) -> None:
    """The agent is still at the commands of a daemon that was killed, or of a hello that gave up."""
    client, vm, _ = saying_hello(hasty)
    vm.ctl.sendall(b"".join(command(code) for code in late))
    vm.answer_questions()
    assert client.receive() == VERSIONED
    client.hyper("execcmd", "{}")
    assert vm.read_command().payload == b"{}"
    vm.say(ERROR)
    assert client.receive() == HYPERSTART_ERROR
    client.hyper("ping")
    vm.acknowledge()
    assert client.receive() == OK


def test_late_answers_to_a_hello_that_gave_up_prove_nothing(hasty: Wire) -> None:
    client, vm, _ = saying_hello(hasty)
    answers = [ACK for _ in range(QUESTIONS)]
    vm.ctl.sendall(b"".join(command(code) for code in answers))
    assert error_of(client.receive()) == "no READY from the VM in 1 s"


def test_what_is_no_answer_does_not_count_as_one(hasty: Wire) -> None:
    client, vm, _ = saying_hello(hasty)
    vm.read_command()
    for code in (NEXT, FINISHCMD, FINISHPOD, ASYNC_EVENT):
        vm.say(code)
    vm.hang_up()
    assert error_of(client.receive())


def test_vm_that_says_ready_after_the_questions_is_registered_and_answers_them_first(hasty: Wire) -> None:
    """They reached it while it booted."""
    client, vm, _ = saying_hello(hasty)
    first = vm.read_command()
    vm.say(READY)
    assert client.receive() == VERSIONED
    client.hyper("getpod")
    vm.say(ACK, VERSION_NUMBER if first.code == GETVERSION else b"")
    vm.answer_questions(QUESTIONS - 1)
    assert vm.read_command().code == 2
    vm.say(ERROR)
    assert client.receive() == HYPERSTART_ERROR


@pytest.mark.parametrize("booted", [True, False])
def test_seqs_begin_at_1_only_in_a_vm_that_was_seen_to_boot(hasty: Wire, booted: bool) -> None:
    client, vm, _ = saying_hello(hasty)
    if booted:
        vm.say(READY)
    else:
        vm.answer_questions()
    assert client.receive() == VERSIONED
    base = client.allocate().base
    assert base == 1 if booted else 2**50 < base < 2**53
    assert client.allocate().base == base + 2


def test_vm_that_never_says_ready_is_refused_in_time_and_the_id_is_free_again(hasty: Wire) -> None:
    client, vm, container = saying_hello(hasty)
    for _ in range(QUESTIONS):
        vm.read_command()
    start = time.monotonic()
    assert error_of(client.receive())
    assert time.monotonic() - start < 3
    assert vm.is_hung_up()
    assert client.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED
    hasty.pod(client, container)


def test_vm_that_sends_events_for_ever_is_refused_in_time(hasty: Wire) -> None:
    client, vm, _ = saying_hello(hasty)
    deadline = time.monotonic() + 5
    while is_silent(client.sock):
        assert time.monotonic() < deadline
        try:
            vm.ctl.sendall(command(NEXT, b"\0\0\0\1") * 50)
        except OSError:
            break
    assert error_of(client.receive())


def test_second_hello_to_a_socket_whose_one_peer_is_there_does_not_hang_for_ever(hasty: Wire) -> None:
    pod = hasty.pod()
    client = hasty.client()
    client.hello(hasty.new_id(), pod.vm)
    assert error_of(client.receive())  # it connected, and nothing ever answered
    assert pod.pings()


def test_client_that_goes_while_hello_waits_leaves_nothing_behind(wire: Wire) -> None:
    client, vm, container = saying_hello(wire)
    client.close()
    vm.hang_up()
    wait_until(lambda: not wire.is_taken(container), "the id is free")
    wire.pod(container=container)


def test_vm_that_is_ready_after_its_client_has_gone_keeps_no_id(wire: Wire) -> None:
    """Nobody was told that it is registered, so nobody would say bye."""
    client, vm, container = saying_hello(wire)
    client.close()
    vm.say(READY)
    wait_until(lambda: not wire.is_taken(container), "the id is free")
    wire.pod(container=container)
