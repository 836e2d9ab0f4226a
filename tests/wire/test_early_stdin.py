"""Stdin that a client sends before its process is started (docs/protocol.md, 3)."""

from __future__ import annotations

import json
import socket

import pytest

from tests.wire.daemon import Pod, Wire
from tests.wire.support import ACK, ERROR, OK, RawClient, Stream, error_of, frame, is_silent, read_exact


def commands(pod: Pod, stream: Stream) -> dict[str, str]:
    """All that start a process on a client's streams."""
    process = {"terminal": False, "stdio": stream.base, "stderr": stream.base + 1, "args": ["cat"]}
    payloads: dict[str, dict[str, object]] = {
        "execcmd": {"container": pod.container, "process": process},
        "newcontainer": {"id": "x", "process": process},
        "startpod": {"hostname": "x", "containers": [{"id": "x", "process": process}]},
    }
    return {name: json.dumps(payload) for name, payload in payloads.items()}


@pytest.mark.parametrize("name", ["execcmd", "newcontainer", "startpod"])
@pytest.mark.parametrize("somebody_else", [False, True])
def test_it_waits_until_the_command_is_acknowledged(wire: Wire, name: str, somebody_else: bool) -> None:
    pod = wire.pod()
    stream, other = pod.client.allocate(), pod.open()
    stream.send(b"early")
    stream.send()
    client: RawClient = wire.attached(pod) if somebody_else else pod.client
    client.hyper(name, commands(pod, stream)[name])
    pod.vm.read_command()
    other.send(b"in")
    assert pod.vm.read_frame() == (other.base, b"in")
    pod.vm.say(ACK)
    assert client.receive() == OK
    assert pod.vm.read_frame() == (stream.base, b"early")
    assert pod.vm.read_frame() == (stream.base, b"")


def test_nothing_goes_to_the_vm_while_there_is_no_process(wire: Wire) -> None:
    pod = wire.pod()
    early, stream = pod.client.allocate(), pod.open()
    early.send(b"early")
    early.sock.shutdown(socket.SHUT_WR)
    stream.send(b"in")
    assert pod.vm.read_frame() == (stream.base, b"in")
    pod.start(early)
    assert [pod.vm.read_frame() for _ in range(2)] == [(early.base, b"early"), (early.base, b"")]


def test_command_that_is_refused_starts_no_process(wire: Wire) -> None:
    pod = wire.pod()
    early, stream = pod.client.allocate(), pod.open()
    early.send(b"early")
    pod.client.hyper("execcmd", commands(pod, early)["execcmd"])
    pod.vm.read_command()
    pod.vm.say(ERROR)
    assert "ERROR received from Hyperstart" in error_of(pod.client.receive())
    stream.send(b"in")
    assert pod.vm.read_frame() == (stream.base, b"in")
    pod.start(early)
    assert pod.vm.read_frame() == (early.base, b"early")


def test_command_that_is_not_sent_starts_no_process(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.client.allocate(), pod.open()
    pod.client.hyper("execcmd", json.dumps({"process": {"stdio": stream.base, "args": ["x" * 10_240]}}))
    assert "message too long" in error_of(pod.client.receive())
    pod.vm.send_frame(stream.base)
    pod.vm.send_frame(other.base, b"that has been read")
    other.read_frame()
    assert is_silent(stream.sock)


def test_empty_frame_before_there_is_a_process_is_no_end_of_file(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.client.allocate(), pod.open()
    pod.vm.send_frame(stream.base)
    pod.vm.send_frame(other.base, b"that has been read")
    other.read_frame()
    pod.start(stream)
    told = b"".join(frame(stream.base, payload) for payload in (b"A", b"BC", b"", b"\3"))
    pod.vm.io.sendall(told)
    assert read_exact(stream.sock, len(told)) == told


def test_end_of_a_quick_process_is_never_lost(wire: Wire) -> None:
    """Its end of file comes on one channel, and the ACK before it on the other: either may be read first."""
    pod = wire.pod()
    for _ in range(100):
        stream = pod.client.allocate()
        pod.client.hyper("execcmd", commands(pod, stream)["execcmd"])
        end = frame(stream.base) + frame(stream.base, b"\0")
        pod.vm.read_command()
        pod.vm.io.sendall(end)
        pod.vm.say(ACK)
        assert read_exact(stream.sock, len(end)) == end
        assert pod.client.receive() == OK
        stream.close()
