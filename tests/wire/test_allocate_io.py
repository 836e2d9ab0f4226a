"""allocateIO hands out stream numbers and an fd (docs/protocol.md, 1)."""

from __future__ import annotations

import os
import socket
import stat
import sys

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    NOT_ATTACHED,
    RawClient,
    error_of,
    is_silent,
    message,
    refused,
    request,
    wait_until,
)


def ask(client: RawClient, streams: object) -> bytes:
    return client.ask("allocateIO", {"nStreams": streams})


def test_response_then_one_byte_f_that_carries_one_fd_in_a_send_of_its_own(wire: Wire) -> None:
    """An fd in the same send as the response would come with the response's first byte."""
    client = wire.pod().client
    client.send(request("allocateIO", {"nStreams": 2}))
    assert client.receive() == b'{"success":true,"data":{"ioBase":1}}'
    data, ancillary, flags, _ = client.sock.recvmsg(100, 1_000)
    assert data == b"F"
    assert not flags & socket.MSG_CTRUNC
    [(level, kind, fds)] = ancillary
    assert (level, kind, len(fds)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 4)
    socket.close(int.from_bytes(fds, sys.byteorder))
    assert error_of(client.ask("x"))  # nothing else came


def test_the_fd_is_one_end_of_a_stream_socket_pair(wire: Wire) -> None:
    stream = wire.pod().client.allocate()
    assert stat.S_ISSOCK(os.fstat(stream.sock.fileno()).st_mode)
    assert stream.sock.family == socket.AF_UNIX
    assert stream.sock.type & socket.SOCK_STREAM
    assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    assert stream.sock.getpeername() == ""
    assert is_silent(stream.sock)


def test_numbers_count_from_1_and_each_stream_takes_one(wire: Wire) -> None:
    client = wire.pod().client
    assert [client.allocate(n).base for n in (2, 1, 1, 2, 2)] == [1, 3, 4, 5, 7]


def test_numbers_are_the_vms_and_shared_by_its_clients(wire: Wire) -> None:
    pod = wire.pod()
    bases = [client.allocate(2).base for client in (pod.client, wire.attached(pod), wire.attached(pod))]
    assert bases == [1, 3, 5]


def test_numbers_are_never_reused(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.allocate(2).close()
    other = wire.attached(pod)
    other.allocate(1).close()
    other.close()
    assert pod.client.allocate(1).base == 4


def test_numbers_start_anew_with_a_new_vm_of_the_same_id(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.allocate()
    pod.client.bye(pod.container)
    assert wire.pod(container=pod.container).client.allocate().base == 1


def test_of_many_clients_at_once_each_gets_its_own_numbers(wire: Wire) -> None:
    pod = wire.pod()
    clients = [wire.attached(pod) for _ in range(20)]
    for client in clients:
        client.send(request("allocateIO", {"nStreams": 2}) * 3)
    bases = sorted(client.receive_io().base for client in clients for _ in range(3))
    assert bases == list(range(1, 121, 2))


def test_pipelined_requests_each_get_their_own_fd(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.send(request("allocateIO", {"nStreams": 1}) * 10 + request("x"))
    streams = [pod.client.receive_io() for _ in range(10)]
    assert pod.client.receive() == refused("no payload named 'x'")
    for stream in streams:
        pod.vm.send_frame(stream.base, b"%d" % stream.base)
    assert [stream.read_frame() for stream in streams] == [(n, b"%d" % n) for n in range(1, 11)]


@pytest.mark.parametrize("streams", [0, 3, -1, 4, 1_000, 2**31, -(2**31), 2**40])
def test_unexpected_number_of_streams_is_an_error_with_the_number(wire: Wire, streams: int) -> None:
    expected = refused(f"asking for unexpected number of streams ({streams})")
    assert ask(wire.pod().client, streams) == expected


@pytest.mark.parametrize("streams", ["9223372036854775808", "18446744073709551616", "1e400", "2.5", "-0"])
def test_number_nobody_expects_is_an_error(wire: Wire, streams: str) -> None:
    client = wire.pod().client
    client.send(message(f'{{"id":"allocateIO","data":{{"nStreams":{streams}}}}}'))
    error_of(client.receive())
    assert client.allocate().base == 1


@pytest.mark.parametrize("streams", [0, 3, "2", None, 1.5])
def test_refused_request_uses_no_number_and_sends_no_fd(wire: Wire, streams: object) -> None:
    client = wire.pod().client
    refusal = request("allocateIO", {"nStreams": streams})
    client.send((refusal + request("allocateIO", {"nStreams": 1})) * 3)
    for base in (1, 2, 3):
        error_of(client.receive())  # asserts that no fd comes along
        assert client.receive_io().base == base


def test_client_that_is_not_attached_is_refused(wire: Wire) -> None:
    client = wire.client()
    client.send(request("allocateIO", {"nStreams": 2}) * 2)
    assert [client.receive(), client.receive()] == [NOT_ATTACHED] * 2


def test_no_fd_is_left_in_the_daemon(wire: Wire) -> None:
    pod = wire.pod()
    before = wire.daemon.count_fds()
    streams = [pod.client.allocate() for _ in range(50)]
    wait_until(lambda: wire.daemon.count_fds() <= before + 50, "one end of each pair")
    for stream in streams:
        stream.close()
    wait_until(lambda: wire.daemon.count_fds() <= before, "none of the ends")
    assert pod.pings()


def test_the_fd_is_the_clients_alone(wire: Wire) -> None:
    """The daemon keeps no copy of the client's end: closing it is seen."""
    pod = wire.pod()
    before = wire.daemon.count_fds()
    stream = pod.client.allocate()
    wait_until(lambda: wire.daemon.count_fds() == before + 1, "one end of the pair")
    stream.close()
    wait_until(lambda: wire.daemon.count_fds() == before, "the session's end")


def test_client_that_goes_without_taking_the_fd_leaves_nothing_behind(wire: Wire) -> None:
    pod = wire.pod()
    before = wire.daemon.count_fds()
    for _ in range(20):
        client = wire.attached(pod)
        client.send(request("allocateIO", {"nStreams": 2}))
        client.close()
    wait_until(lambda: wire.daemon.count_fds() <= before, "all fds given back")
    assert pod.pings()


def test_client_that_takes_response_and_not_the_fd_leaves_nothing_behind(wire: Wire) -> None:
    pod = wire.pod()
    before = wire.daemon.count_fds()
    client = wire.attached(pod)
    client.send(request("allocateIO", {"nStreams": 2}))
    client.receive()
    client.close()
    wait_until(lambda: wire.daemon.count_fds() <= before, "all fds given back")
    assert pod.pings()
