"""attach and bye (docs/protocol.md, 1)."""

from __future__ import annotations

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    ACK,
    NOT_ATTACHED,
    OK,
    READY,
    VERSIONED,
    error_of,
    refused,
    request,
)


def test_attach_associates_the_connection_with_a_registered_vm(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.client()
    assert client.attach(pod.container) == VERSIONED
    assert pod.pings(client)


@pytest.mark.parametrize("container", ["nobody", "", "a/b", "\u00e9", "a b"])
@pytest.mark.parametrize("payload", ["attach", "bye"])
def test_unknown_id_is_an_error_with_its_name(wire: Wire, payload: str, container: str) -> None:
    client = wire.client()
    assert client.ask(payload, {"containerId": container}) == refused(f"unknown containerID: {container}")
    assert client.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED


def test_the_last_attach_counts(wire: Wire) -> None:
    first, second = wire.pod(), wire.pod()
    client = wire.attached(first)
    assert client.attach(second.container) == VERSIONED
    assert second.pings(client)
    assert client.attach(first.container) == VERSIONED
    assert client.attach(first.container) == VERSIONED
    assert first.pings(client)


def test_hello_after_attach_counts(wire: Wire) -> None:
    first = wire.pod()
    second = wire.pod(wire.attached(first))
    assert second.pings()


def test_each_vm_counts_its_own_streams_and_they_do_not_mix(wire: Wire) -> None:
    first, second = wire.pod(), wire.pod()
    client = wire.attached(first)
    a = client.allocate()
    assert client.attach(second.container) == VERSIONED
    b = client.allocate()
    assert (a.base, b.base) == (1, 1)
    first.vm.send_frame(1, b"first")
    second.vm.send_frame(1, b"second")
    assert (a.read_frame(), b.read_frame()) == ((1, b"first"), (1, b"second"))
    b.send(b"to the second")
    a.send(b"to the first")
    assert first.vm.read_frame() == (1, b"to the first")
    assert second.vm.read_frame() == (1, b"to the second")


def test_failed_attach_leaves_the_client_attached_where_it_was(wire: Wire) -> None:
    pod = wire.pod()
    assert error_of(pod.client.attach("nobody"))
    assert pod.pings()


def test_failed_bye_leaves_the_client_attached_and_the_vm_registered(wire: Wire) -> None:
    pod = wire.pod()
    assert error_of(pod.client.bye("nobody"))
    assert pod.pings()
    assert wire.is_registered(pod.container)


def test_bye_unregisters_the_id_and_detaches_this_client(wire: Wire) -> None:
    pod = wire.pod()
    assert pod.client.bye(pod.container) == OK
    assert not wire.is_registered(pod.container)
    assert pod.client.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED
    assert pod.client.ask("hyper", {"hyperName": "ping"}) == NOT_ATTACHED


def test_bye_twice_is_an_unknown_id(wire: Wire) -> None:
    pod = wire.pod()
    assert pod.client.bye(pod.container) == OK
    assert pod.client.bye(pod.container) == refused(f"unknown containerID: {pod.container}")


def test_the_id_can_be_used_again_at_once_while_the_old_vm_lingers(wire: Wire) -> None:
    old = wire.pod()
    stream = wire.attached(old).allocate()
    assert old.client.bye(old.container) == OK
    new = wire.pod(container=old.container)
    assert new.pings()
    fresh = new.client.allocate()
    assert fresh.base == 1
    old.vm.send_frame(stream.base, b"from the old one")
    new.vm.send_frame(fresh.base, b"from the new one")
    assert stream.read_frame().payload == b"from the old one"
    assert fresh.read_frame().payload == b"from the new one"
    old.vm.hang_up()
    assert stream.at_end()
    assert new.pings()
    assert wire.is_registered(new.container)


def test_hello_pipelined_behind_bye_gets_the_id(wire: Wire) -> None:
    pod = wire.pod()
    vm = wire.vm()
    pod.client.send(request("bye", {"containerId": pod.container}))
    pod.client.hello(pod.container, vm)
    assert pod.client.receive() == OK
    vm.accept()
    vm.say(READY)
    assert pod.client.receive() == VERSIONED


def test_any_client_may_say_bye_for_any_id(wire: Wire) -> None:
    pod, other = wire.pod(), wire.pod()
    assert wire.client().bye(pod.container) == OK
    assert not wire.is_registered(pod.container)
    assert wire.client().bye(other.container) == OK


def test_of_many_byes_at_once_one_succeeds(wire: Wire) -> None:
    pod = wire.pod()
    clients = [wire.attached(pod) for _ in range(20)]
    for client in clients:
        client.send(request("bye", {"containerId": pod.container}))
    answers = sorted(client.receive() for client in clients)
    assert answers == sorted([OK] + [refused(f"unknown containerID: {pod.container}")] * 19)


def test_after_bye_what_the_vm_sends_is_delivered_until_it_hangs_up(wire: Wire) -> None:
    pod = wire.pod()
    mine, other = pod.client.allocate(), wire.attached(pod).allocate()
    pod.vm.send_frame(mine.base, b"before")
    assert pod.client.bye(pod.container) == OK
    pod.vm.send_frame(other.base, b"out")
    pod.vm.send_frame(other.base + 1, b"err")
    pod.vm.send_frame(mine.base)
    pod.vm.send_frame(mine.base, b"\7")
    assert [mine.read_frame().payload for _ in range(3)] == [b"before", b"", b"\7"]
    assert [other.read_frame().payload for _ in range(2)] == [b"out", b"err"]
    pod.vm.send_frame(other.base, b"last")
    pod.vm.hang_up()
    assert other.read_frame().payload == b"last"
    assert other.at_end()
    assert mine.at_end()


def test_after_bye_the_sockets_are_closed_when_the_linger_has_passed(hasty: Wire) -> None:
    pod = hasty.pod()
    stream = hasty.attached(pod).allocate()
    assert pod.client.bye(pod.container) == OK
    pod.vm.send_frame(stream.base, b"late")
    assert stream.read_frame() == (stream.base, b"late")
    assert pod.vm.is_hung_up()
    assert stream.at_end()


def test_after_bye_without_streams_the_linger_holds_too(hasty: Wire) -> None:
    pod = hasty.pod()
    pod.client.bye(pod.container)
    pod.client.close()
    assert pod.vm.is_hung_up()


def test_linger_that_has_passed_ends_the_old_vm_and_not_the_new_one(hasty: Wire) -> None:
    old = hasty.pod()
    assert old.client.bye(old.container) == OK
    new = hasty.pod(container=old.container)
    assert old.vm.is_hung_up()
    assert new.pings()
    assert hasty.is_registered(new.container)


def test_command_in_flight_during_bye_gets_one_answer(wire: Wire) -> None:
    pod = wire.pod()
    other = wire.attached(pod)
    other.hyper("destroypod", '""')
    assert pod.vm.read_command() == (4, b'""')
    assert pod.client.bye(pod.container) == OK
    pod.vm.say(ACK)
    pod.vm.hang_up()
    answer = other.receive()
    assert answer == OK or error_of(answer)
    assert error_of(other.ask("x"))
