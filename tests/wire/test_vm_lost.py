"""A VM that dies or talks nonsense loses only itself (docs/protocol.md, 4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    MARKER,
    NOT_ATTACHED,
    OK,
    VERSIONED,
    WAIT,
    FakeVm,
    error_of,
    frame,
    read_exact,
    refused,
    unread_by_peer,
    wait_until,
)


def both_closed(vm: FakeVm) -> None:
    vm.hang_up()


def io_closed(vm: FakeVm) -> None:
    vm.io.close()


def ctl_closed(vm: FakeVm) -> None:
    vm.ctl.close()


def length_11(vm: FakeVm) -> None:
    vm.io.sendall(frame(1, length=11))


def length_0(vm: FakeVm) -> None:
    vm.io.sendall(frame(1, length=0))


def length_0_for_nobody(vm: FakeVm) -> None:
    vm.io.sendall(frame(99, length=0))


def length_2_gib(vm: FakeVm) -> None:
    vm.io.sendall(frame(1, length=2**31))


def length_4_gib(vm: FakeVm) -> None:
    vm.io.sendall(frame(1, b"x" * 100, length=2**32 - 1))


def length_4_gib_for_nobody(vm: FakeVm) -> None:
    vm.io.sendall(frame(99, length=2**32 - 1))


def ones(vm: FakeVm) -> None:
    vm.io.sendall(b"\xff" * 100)


def zeros(vm: FakeVm) -> None:
    vm.io.sendall(b"\0" * 12)


FRAMING_LOST = [
    length_11,
    length_0,
    length_0_for_nobody,
    length_2_gib,
    length_4_gib,
    length_4_gib_for_nobody,
    ones,
    zeros,
]
LOST = [both_closed, io_closed, ctl_closed, *FRAMING_LOST]


@pytest.mark.parametrize("step", LOST)
def test_clients_get_what_had_arrived_then_end_of_file(wire: Wire, step: Callable[[FakeVm], None]) -> None:
    pod = wire.pod()
    streams = [pod.open(client=wire.attached(pod)) for _ in range(3)]
    for stream in streams:
        pod.vm.io.sendall(frame(stream.base, b"o" * 5_000) * 10)
        pod.vm.send_frame(stream.base + 1, b"err")
    if step is ctl_closed:  # nothing is on the way on the other channel
        wait_until(lambda: unread_by_peer(pod.vm.io) == 0, "the I/O channel is read")
    step(pod.vm)
    for stream in streams:
        expected = frame(stream.base, b"o" * 5_000) * 10 + frame(stream.base + 1, b"err")
        assert read_exact(stream.sock, len(expected)) == expected
        assert stream.at_end()


@pytest.mark.parametrize("step", LOST)
def test_a_command_in_flight_fails_and_the_id_is_kept_until_it_is_taken_over(
    wire: Wire, step: Callable[[FakeVm], None]
) -> None:
    pod = wire.pod()
    waiting = wire.attached(pod)
    waiting.hyper("ping")
    pod.vm.read_command()
    step(pod.vm)
    cause = error_of(waiting.receive())
    assert cause.startswith("VM gone: ")
    wire.wait_unregistered(pod.container)
    late = wire.client()
    assert late.attach(pod.container) == VERSIONED
    assert late.ask("allocateIO", {"nStreams": 2}) == refused(cause)
    assert late.ask("hyper", {"hyperName": "ping"}) == refused(cause)
    again = wire.pod(container=pod.container)
    assert again.pings()
    assert again.open().base == 1


@pytest.mark.parametrize("attached", [True, False])
def test_bye_frees_the_id_of_a_vm_that_has_gone(wire: Wire, attached: bool) -> None:
    """A runtime deletes a container after its VM has powered off."""
    pod = wire.pod()
    pod.client.hyper("destroypod", '""')
    pod.vm.acknowledge()
    assert pod.client.receive() == OK
    pod.vm.hang_up()
    wire.wait_unregistered(pod.container)
    client = wire.client()
    if attached:
        assert client.attach(pod.container) == VERSIONED
    assert client.bye(pod.container) == OK
    assert client.bye(pod.container) == refused(f"unknown containerID: {pod.container}")
    assert client.attach(pod.container) == refused(f"unknown containerID: {pod.container}")
    assert wire.pod(container=pod.container).pings()


def test_status_shows_a_vm_that_has_gone_with_the_cause(wire: Wire) -> None:
    pod = wire.pod()
    pod.vm.hang_up()
    wire.wait_unregistered(pod.container)
    client = wire.client()

    def shown() -> dict[str, Any]:
        vms = json.loads(client.ask("status"))["data"]["vms"]
        return next(vm for vm in vms if vm["id"] == pod.container)

    wait_until(lambda: shown()["state"] == "gone", "all is delivered")
    assert "hung up" in shown()["lastError"]["text"]
    assert client.bye(pod.container) == OK


@pytest.mark.parametrize("step", FRAMING_LOST)
def test_lost_framing_closes_both_sockets_of_that_vm_and_no_other(
    wire: Wire, step: Callable[[FakeVm], None]
) -> None:
    pod, other = wire.pod(), wire.pod()
    stream = other.open()
    step(pod.vm)
    assert pod.vm.is_hung_up()
    assert other.pings()
    other.vm.send_frame(1, b"out")
    assert stream.read_frame() == (1, b"out")
    stream.send(b"in")
    assert other.vm.read_frame() == (1, b"in")


@pytest.mark.parametrize("length", [0, 11, 2**32 - 1])
def test_frames_before_the_nonsense_in_the_same_write_arrive(wire: Wire, length: int) -> None:
    pod = wire.pod()
    stream = pod.open()
    pod.vm.io.sendall(frame(1, b"a") + frame(2, b"b") + frame(1, b"c", length=length))
    assert [stream.read_frame(), stream.read_frame()] == [(1, b"a"), (2, b"b")]
    assert stream.at_end()


def test_end_of_file_is_clean_where_the_client_sent_stdin_that_was_never_taken(wire: Wire) -> None:
    """A socket that is closed with something unread gives its peer a reset instead."""
    pod = wire.pod()
    stream = pod.open()
    stream.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        stream.sock.sendall(frame(1, b"x" * 8_000) * 2_000)
    while pod.vm.read_frame().seq < MARKER:  # no echo: the rest has to wait
        pass
    stream.sock.settimeout(WAIT)
    sent = frame(1, b"out" * 3_000) * 20
    pod.vm.io.sendall(sent)
    pod.vm.hang_up()
    assert read_exact(stream.sock, len(sent)) == sent
    assert stream.at_end()


def test_end_of_file_is_clean_in_the_middle_of_a_client_frame(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    stream.sock.sendall(frame(1, b"x" * 100)[:50])
    pod.vm.send_frame(1, b"out")
    assert stream.read_frame() == (1, b"out")
    pod.vm.hang_up()
    assert stream.at_end()


def test_vm_that_dies_with_unread_stdin_is_lost_cleanly(unpaced: Wire) -> None:
    """Its end is closed with something unread: the daemon sees a reset where it expects an end."""
    pod = unpaced.pod()
    stream = pod.open()
    for _ in range(5):
        stream.send(b"x" * 4_000)
    assert len(read_exact(pod.vm.io, 100)) == 100
    sent = frame(1, b"last words") * 100
    pod.vm.io.sendall(sent)
    pod.vm.hang_up()
    assert read_exact(stream.sock, len(sent)) == sent
    assert stream.at_end()
    unpaced.wait_unregistered(pod.container)


def test_vm_that_dies_with_an_unread_command_is_lost_cleanly(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    pod.client.hyper("ping")
    assert pod.vm.ctl.recv(1) == b"\0"
    pod.vm.send_frame(1, b"last words")
    pod.vm.hang_up()
    error_of(pod.client.receive())
    assert stream.read_frame() == (1, b"last words")
    assert stream.at_end()


def test_client_that_did_not_read_gets_all_that_had_arrived(wire: Wire) -> None:
    """More than the sockets hold."""
    pod = wire.pod()
    stream = pod.open()
    sent = b"".join(frame(1, b"%08d" % number * 1_000) for number in range(400))
    pod.vm.io.sendall(sent)
    pod.vm.hang_up()
    wire.wait_unregistered(pod.container)
    again = wire.pod(container=pod.container)
    assert read_exact(stream.sock, len(sent)) == sent
    assert stream.at_end()
    assert again.pings()


def test_a_partial_frame_at_the_end_spoils_nothing(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.open(), pod.open()
    pod.vm.io.sendall(frame(3, b"whole") + frame(1, b"whole") + frame(1, b"x" * 1_000)[:500])
    pod.vm.hang_up()
    assert other.read_frame() == (3, b"whole")
    assert other.at_end()
    assert stream.read_frame() == (1, b"whole")
    rest = b"".join(iter(lambda: stream.sock.recv(100), b""))
    assert frame(1, b"x" * 1_000).startswith(rest)


@pytest.mark.parametrize("step", [both_closed, length_11])
def test_client_of_a_lost_vm_can_go_on_with_another(wire: Wire, step: Callable[[FakeVm], None]) -> None:
    pod, other = wire.pod(), wire.pod()
    step(pod.vm)
    wire.wait_unregistered(pod.container)
    assert error_of(pod.client.ask("allocateIO", {"nStreams": 1})).startswith("VM gone: ")
    assert error_of(pod.client.ask("hyper", {"hyperName": "ping"})).startswith("VM gone: ")
    assert pod.client.attach(other.container) == VERSIONED
    assert other.pings(pod.client)
    fresh = wire.client()
    assert fresh.ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED


def test_vm_that_floods_its_client_and_dies_loses_only_itself(wire: Wire) -> None:
    pod, other = wire.pod(), wire.pod()
    stream = pod.open()
    pod.vm.io.sendall(frame(1, b"flood" * 2_000) * 500)
    assert other.pings()
    pod.vm.hang_up()
    stream.close()
    assert other.pings()
    wire.wait_unregistered(pod.container)


def test_lingering_vm_that_talks_nonsense_is_closed(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    pod.client.bye(pod.container)
    pod.vm.io.sendall(frame(1, b"x") + frame(1, length=3))
    assert stream.read_frame() == (1, b"x")
    assert stream.at_end()
    assert pod.vm.is_hung_up()
