"""Frames from VM to client (docs/protocol.md, 3 and 4)."""

from __future__ import annotations

import random

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    FRAME,
    MARKER,
    Frame,
    Stream,
    frame,
    in_background,
    in_pieces,
    read_exact,
    wait_until,
)


def test_frame_goes_header_included_and_unchanged_to_the_client_that_owns_its_seq(wire: Wire) -> None:
    pod = wire.pod()
    pod.open(client=wire.attached(pod))
    stream = pod.open(client=wire.attached(pod))
    pod.vm.io.sendall(b"\0\0\0\0\0\0\0\3\0\0\0\x0eA\n")
    assert stream.sock.recv(100) == b"\0\0\0\0\0\0\0\3\0\0\0\x0eA\n"


def test_stdout_and_stderr_come_through_one_fd_in_order(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open(2)
    sent = [Frame(stream.base + number % 2, b"%d" % number) for number in range(50)]
    for seq, payload in sent:
        pod.vm.send_frame(seq, payload)
    assert [stream.read_frame() for _ in sent] == sent


@pytest.mark.parametrize("size", [1, 5, 11, 12, 13, 64])
def test_frames_may_arrive_in_pieces(wire: Wire, size: int) -> None:
    pod = wire.pod()
    stream = pod.open()
    sent = frame(1, b"hello") + frame(2) + frame(1, b"x" * 100) + frame(1)
    for piece in in_pieces(sent, size):
        pod.vm.io.sendall(piece)
    assert read_exact(stream.sock, len(sent)) == sent


def test_several_frames_may_arrive_at_once(wire: Wire) -> None:
    pod = wire.pod()
    streams = [pod.open(1, client=wire.attached(pod)) for _ in range(3)]
    sent = [Frame(number % 3 + 1, b"%d" % number) for number in range(3_000)]
    pod.vm.io.sendall(b"".join(frame(*each) for each in sent))
    for stream in streams:
        mine = [each for each in sent if each.seq == stream.base]
        assert [stream.read_frame() for _ in mine] == mine


@pytest.mark.parametrize("size", [0, 1, 11, 12, 4_084, 4_085, 8_192, 10_227, 10_228])
def test_frames_of_every_size_of_hyperstart_arrive_whole(wire: Wire, size: int) -> None:
    pod = wire.pod()
    stream = pod.open()
    payload = random.Random(size).randbytes(size)
    pod.vm.send_frame(2, payload)
    pod.vm.send_frame(1, b"next")
    assert [stream.read_frame(), stream.read_frame()] == [(2, payload), (1, b"next")]


def test_a_client_gets_no_frame_over_10240_bytes(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    pod.vm.io.sendall(frame(1, b"a" * 10_228) * 5)
    for _ in range(5):
        _, length = FRAME.unpack(read_exact(stream.sock, FRAME.size))
        assert length == 10_240
        read_exact(stream.sock, length - FRAME.size)


def test_exit_sequence_passes(wire: Wire) -> None:
    """An empty frame and one with the exit status, often in one read of 25 bytes."""
    pod = wire.pod()
    stream = pod.open()
    pod.vm.io.sendall(frame(1) + frame(1, b"\7"))
    assert [stream.read_frame(), stream.read_frame()] == [(1, b""), (1, b"\7")]
    pod.vm.send_frame(2)
    assert stream.read_frame() == (2, b"")


@pytest.mark.parametrize("seq", [0, 3, 4, 2**32 + 1, MARKER - 1, MARKER, MARKER + 1, MARKER + 2, 2**64 - 1])
@pytest.mark.parametrize("payload", [b"", b"payload"])
def test_seq_that_nobody_owns_is_dropped(wire: Wire, seq: int, payload: bytes) -> None:
    pod = wire.pod()
    stream = pod.open(2)
    pod.vm.io.sendall(frame(1, b"a") + frame(seq, payload) + frame(1, b"b"))
    for piece in in_pieces(frame(seq, payload), 7):
        pod.vm.io.sendall(piece)
    pod.vm.send_frame(2, b"c")
    assert [stream.read_frame().payload for _ in range(3)] == [b"a", b"b", b"c"]


def test_one_stream_owns_one_seq(wire: Wire) -> None:
    pod = wire.pod()
    first, second = pod.open(1), pod.open(1)
    pod.vm.io.sendall(frame(2, b"second") + frame(1, b"first"))
    assert first.read_frame() == (1, b"first")
    assert second.read_frame() == (2, b"second")


def test_seq_that_nobody_owns_any_more_is_dropped(wire: Wire) -> None:
    pod = wire.pod()
    gone, stays = pod.open(), pod.open()
    before = wire.daemon.count_fds()
    pod.vm.send_frame(gone.base, b"x")
    gone.read_frame()
    gone.close()
    pod.vm.io.sendall(frame(gone.base, b"into the void") * 100 + frame(stays.base, b"here"))
    assert stays.read_frame() == (stays.base, b"here")
    wait_until(lambda: wire.daemon.count_fds() < before, "the session's fd is closed")
    pod.vm.io.sendall(frame(gone.base + 1, b"into the void") * 100 + frame(stays.base, b"again"))
    assert stays.read_frame() == (stays.base, b"again")
    assert pod.pings()


def test_flood_of_frames_that_nobody_owns_hides_nothing(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    pod.vm.io.sendall(frame(77, b"x" * 1_000) * 2_000 + frame(stream.base, b"here"))
    assert stream.read_frame() == (stream.base, b"here")


def test_frames_of_two_vms_do_not_mix(wire: Wire) -> None:
    pods = [wire.pod() for _ in range(4)]
    streams = [pod.open() for pod in pods]
    for number, pod in enumerate(pods):
        pod.vm.io.sendall(frame(1, b"%d" % number) * 100)
    for number, stream in enumerate(streams):
        assert [stream.read_frame() for _ in range(100)] == [(1, b"%d" % number)] * 100


def test_many_streams_in_random_pieces_arrive_whole_and_in_order(wire: Wire) -> None:
    pod = wire.pod()
    streams = [pod.open(client=wire.attached(pod)) for _ in range(8)]
    rng = random.Random(11)
    sent: dict[int, bytearray] = {stream.base: bytearray() for stream in streams}
    everything = bytearray()
    for _ in range(1_500):
        base = rng.choice(streams).base
        one = frame(base + rng.randrange(2), rng.randbytes(rng.choice([0, 1, 64, 1_000, 3_000, 10_228])))
        sent[base] += one
        everything += one

    def send() -> None:
        rest = memoryview(everything)
        while rest:
            cut = rng.choice([1, 11, 12, 13, 500, 4_096, 70_000])
            pod.vm.io.sendall(rest[:cut])
            rest = rest[cut:]

    with in_background(send):
        for stream in streams:
            assert read_exact(stream.sock, len(sent[stream.base])) == sent[stream.base]


def test_client_that_reads_in_small_pieces_gets_all(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    sent = b"".join(frame(1, b"%06d" % number) for number in range(2_000))
    pod.vm.io.sendall(sent)
    got = b"".join(stream.sock.recv(7) for _ in range(100))
    assert got + read_exact(stream.sock, len(sent) - len(got)) == sent


def test_session_ended_by_its_client_stops_no_other(wire: Wire) -> None:
    pod = wire.pod()
    streams: list[Stream] = [pod.open(client=wire.attached(pod)) for _ in range(10)]
    for gone in streams[:-1]:
        pod.vm.io.sendall(frame(gone.base, b"x" * 1_000) * 5)
        gone.close()
        pod.vm.io.sendall(frame(gone.base, b"x" * 1_000) * 5 + frame(streams[-1].base, b"here"))
        assert streams[-1].read_frame().payload == b"here"
