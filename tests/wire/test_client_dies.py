"""A client that dies at each step leaves its VM, its fellows and the daemon as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.wire.daemon import Pod, Wire
from tests.wire.support import ACK, MIB, READY, frame, hello_data, message, request

Death = Callable[[Wire, Pod], None]


def after_connect(wire: Wire, pod: Pod) -> None:
    wire.client().close()


def in_a_header(wire: Wire, pod: Pod) -> None:
    for size in range(1, 8):
        client = wire.client()
        client.send(request("x")[:size])
        client.close()


def after_a_header(wire: Wire, pod: Pod) -> None:
    client = wire.client()
    client.send(message(b"", length=MIB))
    client.close()


def in_a_text(wire: Wire, pod: Pod) -> None:
    client = wire.client()
    client.send(message(b'{"id":"hyper","data":{', length=1_000))
    client.close()


def without_reading_a_response(wire: Wire, pod: Pod) -> None:
    for data in ({"containerId": pod.container}, {"containerId": "nobody"}, 5):
        client = wire.client()
        client.send(request("attach", data) * 20)
        client.close()


def after_attach(wire: Wire, pod: Pod) -> None:
    wire.attached(pod).close()


def before_hello_connects(wire: Wire, pod: Pod) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.send(request("hello", hello_data(container, vm)))
    client.close()
    vm.accept()
    vm.hang_up()
    wire.wait_unregistered(container)


def before_ready(wire: Wire, pod: Pod) -> None:
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.hello(container, vm)
    vm.accept()
    client.close()
    vm.say(READY)
    vm.hang_up()
    wire.wait_unregistered(container)


def after_hello(wire: Wire, pod: Pod) -> None:
    other = wire.pod()
    other.client.close()
    assert other.pings(wire.attached(other))


def before_the_fd_is_sent(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    client.send(request("allocateIO", {"nStreams": 2}) * 5)
    client.close()


def before_the_fd_is_taken(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    client.send(request("allocateIO", {"nStreams": 2}))
    client.receive()
    client.close()


def with_an_io_fd(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    client.allocate()
    client.close_all()


def connection_first_then_the_io_fd(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    stream = client.allocate()
    client.close()
    assert wire.client().ask("x")
    stream.close()


def with_output_on_the_way(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    stream = client.allocate()
    pod.vm.io.sendall(frame(stream.base, b"x" * 5_000) * 100)
    client.close_all()
    pod.vm.io.sendall(frame(stream.base, b"x" * 5_000) * 100)


def with_output_in_the_middle_of_a_frame(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    stream = client.allocate()
    whole = frame(stream.base, b"x" * 5_000)
    pod.vm.io.sendall(whole + whole[:2_000])
    stream.read_frame()
    client.close_all()
    pod.vm.io.sendall(whole[2_000:])


def with_stdin_on_the_way(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    stream = pod.open(client=client)
    stream.send(b"gone")
    client.close_all()
    assert pod.vm.next_frame() == (stream.base, b"gone")


def in_a_frame_header(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    stream = pod.open(client=client)
    stream.sock.sendall(frame(stream.base)[:9])
    client.close_all()


def while_its_command_runs(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    client.hyper("destroypod")
    pod.vm.read_command()
    client.close()
    pod.vm.say(ACK)


def while_its_command_waits_for_anothers(wire: Wire, pod: Pod) -> None:
    first, second = wire.attached(pod), wire.attached(pod)
    first.hyper("ping", "1")
    assert pod.vm.read_command().payload == b"1"
    second.hyper("destroypod")
    second.close()
    pod.vm.say(ACK)
    first.receive()
    # Whether it is sent all the same is open: the VM answers what it gets until it is this ping.
    first.hyper("ping", "2")
    while pod.vm.acknowledge().payload != b"2":
        pass
    first.receive()


def with_many_commands_pipelined(wire: Wire, pod: Pod) -> None:
    client = wire.attached(pod)
    client.send(request("hyper", {"hyperName": "ping", "data": 1}) * 10)
    assert pod.vm.acknowledge().payload == b"1"
    client.close()
    pod.client.hyper("ping", "2")
    while pod.vm.acknowledge().payload != b"2":
        pass
    pod.client.receive()


def after_bye(wire: Wire, pod: Pod) -> None:
    other = wire.pod()
    other.client.bye(other.container)
    other.client.close()
    other.vm.hang_up()


def while_its_vm_lingers(wire: Wire, pod: Pod) -> None:
    other = wire.pod()
    stream = other.open()
    other.client.bye(other.container)
    other.vm.send_frame(stream.base, b"x")
    other.client.close_all()
    other.vm.io.sendall(frame(stream.base, b"x") * 100)


DEATHS: list[Death] = [
    after_connect,
    in_a_header,
    after_a_header,
    in_a_text,
    without_reading_a_response,
    after_attach,
    before_hello_connects,
    before_ready,
    after_hello,
    before_the_fd_is_sent,
    before_the_fd_is_taken,
    with_an_io_fd,
    connection_first_then_the_io_fd,
    with_output_on_the_way,
    with_output_in_the_middle_of_a_frame,
    with_stdin_on_the_way,
    in_a_frame_header,
    while_its_command_runs,
    while_its_command_waits_for_anothers,
    with_many_commands_pipelined,
    after_bye,
    while_its_vm_lingers,
]


@pytest.mark.parametrize("death", DEATHS)
def test_client_that_dies_leaves_the_others_as_they_were(wire: Wire, death: Death) -> None:
    """What it leaves behind in the daemon is checked after every test."""
    pod = wire.pod()
    stream = pod.open()
    death(wire, pod)
    assert pod.pings()
    pod.vm.send_frame(stream.base, b"out")
    assert stream.read_frame() == (stream.base, b"out")
    stream.send(b"in")
    while (taken := pod.vm.next_frame()).seq != stream.base:
        pass
    assert taken.payload == b"in"
    assert wire.is_registered(pod.container)
