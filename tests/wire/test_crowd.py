"""Many clients and VMs at once, and everything that races."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from tests.wire.daemon import Pod, Wire
from tests.wire.support import (
    NOT_ATTACHED,
    OK,
    READY,
    VERSIONED,
    error_of,
    frame,
    in_background,
    read_exact,
    refused,
    request,
)


def test_many_vms_and_clients_at_once(wire: Wire) -> None:
    pods = [wire.pod() for _ in range(12)]
    clients = [(pod, wire.attached(pod)) for pod in pods for _ in range(5)]
    for _, client in clients:
        client.send(request("allocateIO", {"nStreams": 2}))
    streams = [(pod, client.receive_io()) for pod, client in clients]
    for number, (pod, stream) in enumerate(streams):
        pod.vm.send_frame(stream.base, b"out %d" % number)
        stream.send(b"in %d" % number)
    for number, (_, stream) in enumerate(streams):
        assert stream.read_frame() == (stream.base, b"out %d" % number)
    for pod in pods:
        expected = {
            (stream.base, b"in %d" % number) for number, (owner, stream) in enumerate(streams) if owner is pod
        }
        assert {pod.vm.next_frame() for _ in expected} == expected
    for pod, client in clients:
        client.hyper("ping", f'"{pod.container}"')
    for pod in pods:
        for _ in range(5):
            assert pod.vm.acknowledge().payload == f'"{pod.container}"'.encode()
    assert {client.receive() for _, client in clients} == {OK}


def test_many_hellos_at_once(wire: Wire) -> None:
    waiting = [(wire.client(), wire.vm(), wire.new_id()) for _ in range(30)]
    for client, vm, container in waiting:
        client.hello(container, vm)
    for _, vm, _ in waiting:
        vm.accept()
    for _, vm, _ in reversed(waiting):
        vm.say(READY)
    for client, vm, container in waiting:
        assert client.receive() == VERSIONED
        assert Pod(container, client, vm).pings()


def acknowledge_all(pod: Pod) -> None:
    """An agent that answers until it is hung up on."""
    with suppress(AssertionError, OSError):
        while True:
            pod.vm.acknowledge()


def test_bye_races_with_everything(wire: Wire) -> None:
    """Every request gets its one response, in order."""
    pod = wire.pod()
    rng = random.Random(13)
    everything = [
        request("attach", {"containerId": pod.container}),
        request("hyper", {"hyperName": "ping"}),
        request("allocateIO", {"nStreams": 1}),
        request("hyper", {"hyperName": "getpod", "data": {}}),
    ]
    bye = request("bye", {"containerId": pod.container})
    clients = [wire.client() for _ in range(16)]
    with in_background(lambda: acknowledge_all(pod)):
        for client in clients:
            requests = list(everything)
            requests.insert(rng.randint(1, 4), bye)
            client.send(b"".join([*requests, request("end")]))
        for client in clients:
            answers = []
            while (response := client.receive()) != refused("no payload named 'end'"):
                answers.append(response)
                if b"ioBase" in response:
                    client.receive_fd(0)
                elif response not in {OK, VERSIONED}:
                    error_of(response)
            assert len(answers) == 5
        assert wire.client().bye(pod.container) == refused(f"unknown containerID: {pod.container}")
        pod.vm.ctl.shutdown(socket.SHUT_RDWR)
    wire.pod(container=pod.container)


def test_hello_races_with_bye_and_attach(wire: Wire) -> None:
    container = wire.new_id()
    for _ in range(10):
        vm = wire.vm()
        winner = wire.client()
        others = [wire.client() for _ in range(6)]
        winner.hello(container, vm)
        vm.accept()
        for number, client in enumerate(others):
            client.send(request(["attach", "bye"][number % 2], {"containerId": container}) * 3)
        vm.say(READY)
        assert winner.receive() == VERSIONED
        responses = [client.receive() for client in others for _ in range(3)]
        unknown = refused(f"unknown containerID: {container}")
        assert set(responses) <= {OK, VERSIONED, unknown}
        assert responses.count(OK) <= 1
        assert winner.bye(container) == (unknown if OK in responses else OK)


def test_end_of_the_vm_races_with_everything(wire: Wire) -> None:
    for delay in range(8):
        pod = wire.pod()
        clients = [wire.attached(pod) for _ in range(6)]
        streams = [client.allocate() for client in clients]
        for client, stream in zip(clients, streams, strict=True):
            pod.vm.io.sendall(frame(stream.base, b"x" * 3_000) * 4)
            stream.send(b"y" * 2_000)
            client.hyper("ping")
            client.send(request("allocateIO", {"nStreams": 2}))
            client.send(request("end"))
        for _ in range(min(delay, len(clients))):
            pod.vm.acknowledge()
        pod.vm.hang_up()
        for client, stream in zip(clients, streams, strict=True):
            while (response := client.receive()) != refused("no payload named 'end'"):
                if b"ioBase" in response:
                    assert client.receive_fd(0).at_end()
                elif response != OK:
                    error_of(response)
            sent = frame(stream.base, b"x" * 3_000) * 4
            assert read_exact(stream.sock, len(sent)) == sent
            assert stream.at_end()
        wire.wait_unregistered(pod.container)


def test_frames_flow_while_clients_come_and_go(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    for number in range(50):
        client = wire.attached(pod)
        passing = client.allocate()
        pod.vm.io.sendall(frame(stream.base, b"%d" % number) + frame(passing.base, b"%d" % number))
        if number % 2:
            assert passing.read_frame().payload == b"%d" % number
        client.close_all()
        assert stream.read_frame().payload == b"%d" % number
        stream.send(b"%d" % number)
        assert pod.vm.next_frame() == (stream.base, b"%d" % number)
    assert wire.client().ask("allocateIO", {"nStreams": 1}) == NOT_ATTACHED
