"""Bytes at random, and valid ones with a few of them changed: no peer harms any other."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import ACK, ERROR, NEXT, command, frame, message, request

ROUNDS = 40


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out or put in."""
    damaged = bytearray(data)
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(damaged))
        match rng.randrange(3):
            case 0:
                damaged[place] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
            case 1:
                del damaged[place]
            case _:
                damaged[place:place] = rng.randbytes(rng.randint(1, 9))
    return bytes(damaged)


def send_what_goes(sock: socket.socket, data: bytes) -> None:
    """Closing what was not read entirely is the other side's right."""
    with suppress(OSError):
        sock.sendall(data)


def drain(sock: socket.socket) -> None:
    """To the end, whatever it looks like."""
    sock.shutdown(socket.SHUT_WR)
    with suppress(OSError):
        while sock.recv(100_000):
            pass


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_clients(wire: Wire, seed: int) -> None:
    rng = random.Random(seed)
    pod = wire.pod()
    texts = [
        b'{"id":"attach","data":{"containerId":"nobody"}}',
        b'{"id":"hello","data":{"containerId":"a","ctlSerial":"/a","ioSerial":"/b","console":""}}',
        b'{"id":"allocateIO","data":{"nStreams":2}}',
        b'{"id":"hyper","data":{"hyperName":"ping","data":{"a":[1,2.5e3,"\\u00e9"],"b":null}}}',
        b'{"id":"bye","data":{"containerId":"nobody"}}',
    ]
    for _ in range(ROUNDS):
        client = wire.client()
        valid = b"".join(message(rng.choice(texts)) for _ in range(rng.randint(1, 5)))
        send_what_goes(client.sock, damaged(rng, valid) if rng.random() < 0.8 else rng.randbytes(60))
        drain(client.sock)
        client.close()
    assert pod.pings()


@pytest.mark.parametrize("seed", range(5))
def test_noise_on_io_fds(wire: Wire, seed: int) -> None:
    rng = random.Random(seed)
    pod = wire.pod()
    quiet = pod.open(client=wire.attached(pod))
    client = wire.attached(pod)
    for _ in range(ROUNDS):
        client.send(request("allocateIO", {"nStreams": rng.randint(1, 2)}))
        stream = client.receive_io()
        valid = b"".join(frame(stream.base, rng.randbytes(rng.randint(0, 9))) for _ in range(4))
        send_what_goes(stream.sock, damaged(rng, valid))
        stream.close()
    quiet.send(b"at last")
    while (taken := pod.vm.next_frame()).seq != quiet.base:
        pass
    assert taken.payload == b"at last"


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_vms(wire: Wire, seed: int) -> None:
    rng = random.Random(seed)
    other = wire.pod()
    for _ in range(ROUNDS // 4):
        pod = wire.pod()
        stream = pod.open()
        pod.client.hyper("ping")
        pod.vm.read_command()
        answers = command(NEXT, b"\0\0\0\10") + command(rng.choice([ACK, ERROR]), rng.randbytes(5))
        output = b"".join(frame(rng.randint(0, 3), rng.randbytes(20)) for _ in range(20))
        send_what_goes(pod.vm.io, damaged(rng, output))
        send_what_goes(pod.vm.ctl, damaged(rng, answers))
        pod.vm.hang_up()
        pod.client.receive()
        while stream.sock.recv(100_000):
            pass
        wire.wait_unregistered(pod.container)
    assert other.pings()
