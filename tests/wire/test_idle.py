"""Whatever a peer leaves half done, the daemon waits for it without a busy loop."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.wire.daemon import Pod, Wire
from tests.wire.support import MARKER, frame, request, wait_until

State = Callable[[Wire, Pod], None]


def nothing_but_idle_ones(wire: Wire, pod: Pod) -> None:
    pod.open()


def client_that_does_not_read(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    pod.vm.io.sendall(frame(stream.base, b"x" * 10_000) * 200)


def client_that_does_not_read_and_sends_no_more(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    pod.vm.io.sendall(frame(stream.base, b"x" * 10_000) * 200)
    stream.sock.shutdown(socket.SHUT_WR)


def stdin_that_waits_for_its_marker(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    stream.sock.setblocking(False)
    with suppress(BlockingIOError):
        stream.sock.sendall(frame(stream.base, b"x" * 8_000) * 100)
    while pod.vm.read_frame().seq < MARKER:
        pass


def client_that_went_while_its_stdin_waited(wire: Wire, pod: Pod) -> None:
    stdin_that_waits_for_its_marker(wire, pod)
    pod.client.close_all()


def client_that_sends_no_more_while_its_stdin_waits(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    stream.send(b"x" * 5_000)
    while pod.vm.read_frame().seq < MARKER:
        pass
    stream.sock.shutdown(socket.SHUT_WR)


def client_that_sends_no_more(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    stream.sock.shutdown(socket.SHUT_WR)


def client_that_takes_no_more(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    stream.sock.shutdown(socket.SHUT_RD)
    with suppress(BrokenPipeError):
        pod.vm.io.sendall(frame(stream.base, b"x" * 1_000) * 10)


def client_in_the_middle_of_a_frame(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    stream.sock.sendall(frame(stream.base, b"x" * 100)[:50])


def vm_in_the_middle_of_a_frame(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    pod.vm.io.sendall(frame(stream.base, b"x" * 100)[:50])
    pod.vm.ctl.sendall(b"\0\0\0")


def urgent_data(wire: Wire, pod: Pod) -> None:
    stream = pod.open()
    for sock in (stream.sock, pod.client.sock, pod.vm.io, pod.vm.ctl):
        with suppress(OSError):  # not every kernel has it here
            sock.send(b"!", socket.MSG_OOB)


def vm_that_lingers(wire: Wire, pod: Pod) -> None:
    other = wire.pod()
    other.open()
    other.client.bye(other.container)


def vm_that_lingers_and_sends_no_more_on_one_channel(wire: Wire, pod: Pod) -> None:
    other = wire.pod()
    other.open()
    other.client.bye(other.container)
    other.vm.ctl.shutdown(socket.SHUT_WR)


def hello_that_waits(wire: Wire, pod: Pod) -> None:
    client, vm = wire.client(), wire.vm()
    client.hello(wire.new_id(), vm)
    vm.accept()


def hello_whose_client_went(wire: Wire, pod: Pod) -> None:
    client, vm = wire.client(), wire.vm()
    client.hello(wire.new_id(), vm)
    vm.accept()
    client.close()


def commands_that_wait(wire: Wire, pod: Pod) -> None:
    for _ in range(5):
        wire.attached(pod).hyper("destroypod")


def command_whose_client_went(wire: Wire, pod: Pod) -> None:
    pod.client.hyper("destroypod")
    pod.vm.read_command()
    pod.client.close()


def client_that_does_not_read_its_responses(wire: Wire, pod: Pod) -> None:
    client = wire.client()
    client.sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            client.send(request("x") * 1_000)


def half_a_request(wire: Wire, pod: Pod) -> None:
    wire.client().send(request("x")[:10])


@pytest.mark.parametrize(
    "state",
    [
        nothing_but_idle_ones,
        client_that_does_not_read,
        client_that_does_not_read_and_sends_no_more,
        stdin_that_waits_for_its_marker,
        client_that_went_while_its_stdin_waited,
        client_that_sends_no_more_while_its_stdin_waits,
        client_that_sends_no_more,
        client_that_takes_no_more,
        client_in_the_middle_of_a_frame,
        vm_in_the_middle_of_a_frame,
        urgent_data,
        vm_that_lingers,
        vm_that_lingers_and_sends_no_more_on_one_channel,
        hello_that_waits,
        hello_whose_client_went,
        commands_that_wait,
        command_whose_client_went,
        client_that_does_not_read_its_responses,
        half_a_request,
    ],
)
def test_it_takes_no_cpu_time_to_wait_for(wire: Wire, state: State) -> None:
    state(wire, wire.pod())
    other = wire.pod()
    assert other.pings()
    never = threading.Event()

    def rests() -> bool:
        before = wire.daemon.cpu_seconds()
        never.wait(0.1)
        return wire.daemon.cpu_seconds() - before <= 0.03

    wait_until(rests, "the daemon rests", 3)
    assert other.pings()
