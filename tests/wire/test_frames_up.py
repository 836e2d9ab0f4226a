"""Frames from client to VM (docs/protocol.md, 3 and 4)."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from tests.wire.daemon import Pod, Wire
from tests.wire.support import (
    FRAME,
    MARKER,
    MIB,
    Stream,
    frame,
    in_background,
    in_pieces,
    is_silent,
    wait_until,
)


def test_frame_goes_to_the_vm(wire: Wire) -> None:
    pod = wire.pod()
    pod.open()
    stream = pod.open()
    stream.sock.sendall(b"\0\0\0\0\0\0\0\3\0\0\0\x12line1\n")
    assert pod.vm.io.recv(100) == b"\0\0\0\0\0\0\0\3\0\0\0\x12line1\n"


@pytest.mark.parametrize("size", [1, 5, 11, 12, 13])
def test_frames_may_come_in_pieces(wire: Wire, size: int) -> None:
    pod = wire.pod()
    stream = pod.open()
    for piece in in_pieces(frame(1, b"hello ") + frame(1, b"world") + frame(1), size):
        stream.sock.sendall(piece)
    assert pod.vm.take_stdin(1, 11) == b"hello world"
    assert pod.vm.next_frame() == (1, b"")


def test_several_frames_may_come_at_once(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    stream.sock.sendall(b"".join(frame(1, b"%04d" % number) for number in range(100)))
    assert pod.vm.take_stdin(1, 400) == b"".join(b"%04d" % number for number in range(100))


def test_empty_frame_is_end_of_file_and_passes_behind_the_data(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    stream.send(b"a" * 2_000)
    stream.send()
    assert pod.vm.take_stdin(1, 2_000) == b"a" * 2_000
    assert pod.vm.next_frame() == (1, b"")


def test_empty_frame_alone_passes_at_once(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    stream.send()
    assert pod.vm.read_frame() == (1, b"")


def test_output_goes_on_after_the_end_of_stdin(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    stream.send()
    assert pod.vm.next_frame() == (1, b"")
    pod.vm.send_frame(1, b"out")
    pod.vm.send_frame(2, b"err")
    assert [stream.read_frame(), stream.read_frame()] == [(1, b"out"), (2, b"err")]


WRONG = {
    "stderr's seq": frame(4, b"evil"),
    "seq of another client": frame(1, b"evil"),
    "seq of another client, empty": frame(1),
    "seq nobody has": frame(5, b"evil"),
    "seq 0": frame(0, b"evil"),
    "seq of a marker": frame(MARKER + 3),
    "biggest seq": frame(2**64 - 1, b"evil"),
    "length 11": frame(3, b"evil", length=11),
    "length 0": frame(3, b"evil", length=0),
    "length 4": frame(3, b"evil", length=4),
    "wrong seq and 4 GiB": frame(9, b"evil", length=2**32 - 1),
    "text": b"GET / HTTP/1.0\r\n\r\n",
    "a megabyte of wrong": frame(9, b"evil" * 5_000) * 50,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_frame_ends_that_session_and_nothing_of_it_reaches_the_vm(wire: Wire, wrong: bytes) -> None:
    pod = wire.pod()
    others, client = pod.open(client=wire.attached(pod)), wire.attached(pod)
    stream = pod.open(client=client)
    assert (others.base, stream.base) == (1, 3)
    stream.send(b"right")
    with suppress(BrokenPipeError, ConnectionResetError):  # what came behind the wrong header was not read
        stream.sock.sendall(wrong)
        assert stream.at_end()
    others.send(b"right too")
    assert sorted(pod.vm.next_frame() for _ in range(2)) == [(1, b"right too"), (3, b"right")]
    # Nobody else notices, nor does this client's connection.
    pod.vm.io.sendall(frame(3, b"nobody's") + frame(4, b"nobody's") + frame(1, b"out"))
    assert others.read_frame() == (1, b"out")
    assert pod.pings(client)
    assert client.allocate().base == 5


def test_wrong_frame_behind_a_right_one_in_the_same_write(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.open(), pod.open()
    stream.sock.sendall(frame(1, b"right") + frame(2, b"wrong") + frame(1, b"too late"))
    assert pod.vm.read_frame() == (1, b"right")
    with suppress(ConnectionResetError):  # what came behind it was not read
        assert stream.at_end()
    other.send(b"next")
    assert pod.vm.read_frame() == (3, b"next")


def test_wrong_frame_in_pieces(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.open(), pod.open()
    for piece in in_pieces(frame(2, b"")[:11], 1):
        stream.sock.sendall(piece)
    other.send(b"meanwhile")
    assert pod.vm.read_frame() == (3, b"meanwhile")
    stream.sock.sendall(frame(2)[11:])
    assert stream.at_end()


def test_half_a_header_keeps_nobody_waiting(wire: Wire) -> None:
    pod = wire.pod()
    silent, other = pod.open(), pod.open()
    silent.sock.sendall(frame(1, b"x")[:7])
    other.send(b"served")
    assert pod.vm.read_frame() == (3, b"served")
    pod.vm.send_frame(1, b"out")
    assert silent.read_frame() == (1, b"out")


def test_frames_of_different_clients_are_never_interleaved(wire: Wire) -> None:
    """Each sends half a frame, then all send the rest."""
    pod = wire.pod()
    streams = [pod.open(client=wire.attached(pod)) for _ in range(5)]
    whole = {stream.base: b"%d" % stream.base * 100 for stream in streams}
    for stream in streams:
        stream.sock.sendall(frame(stream.base, whole[stream.base])[:50])
    for stream in reversed(streams):
        stream.sock.sendall(frame(stream.base, whole[stream.base])[50:])
    taken = dict.fromkeys(whole, b"")
    while taken != whole:
        seq, payload = pod.vm.next_frame()
        taken[seq] += payload
        assert whole[seq].startswith(taken[seq])


def test_client_that_goes_in_the_middle_of_a_frame_spoils_nothing(wire: Wire) -> None:
    pod = wire.pod()
    gone, stays = pod.open(), pod.open()
    gone.sock.sendall(frame(1, b"x" * 100)[:60])
    gone.close()
    stays.send(b"whole")
    while (taken := pod.vm.next_frame()).seq == 1:
        assert set(taken.payload) <= set(b"x")
    assert taken == (3, b"whole")


def test_frame_of_4_gib_neither_grows_nor_stops_the_daemon(wire: Wire) -> None:
    pod = wire.pod()
    big, other = pod.open(), pod.open()
    before = wire.daemon.resident_bytes()
    big.sock.setblocking(False)
    big.sock.send(FRAME.pack(1, 2**32 - 1))
    try:
        for _ in range(1_000):
            big.sock.send(b"x" * 10_000)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    other.send(b"served")
    while (taken := pod.vm.read_frame()).seq != 3:
        assert taken.seq in {1, MARKER + 1}
    assert taken == (3, b"served")
    assert wire.daemon.resident_bytes() - before < 8 * MIB


@pytest.mark.parametrize("size", [4_084, 4_085, 5_000, 8_180, 10_228])
def test_frames_are_split_into_at_most_4096_bytes(unpaced: Wire, size: int) -> None:
    """`read_frame` takes no longer ones."""
    pod = unpaced.pod()
    stream = pod.open()
    payload = random.Random(size).randbytes(size)
    stream.send(payload)
    stream.send(b"end")
    stream.send()
    taken = [pod.vm.read_frame()]
    while taken[-1].payload:
        taken.append(pod.vm.read_frame())
    assert {seq for seq, _ in taken} == {1}
    assert b"".join(payload for _, payload in taken) == payload + b"end"


def test_parts_of_a_split_frame_make_no_end_of_file(unpaced: Wire) -> None:
    pod = unpaced.pod()
    stream = pod.open()
    for size in (4_084, 8_168, 8_180):
        stream.send(b"x" * size)
        taken = 0
        while taken < size:
            payload = pod.vm.read_frame().payload
            assert payload
            taken += len(payload)
        assert taken == size


def test_many_clients_sending_at_once_lose_nothing(unpaced: Wire) -> None:
    pod = unpaced.pod()
    streams = [pod.open(client=unpaced.attached(pod)) for _ in range(6)]
    rng = random.Random(5)
    data = {stream.base: rng.randbytes(150_000) for stream in streams}

    def send() -> None:
        for start in range(0, 150_000, 7_000):
            for stream in streams:
                stream.send(data[stream.base][start : start + 7_000])

    with in_background(send):
        taken = _take(pod, streams, 150_000)
    assert taken == data


def test_vm_that_does_not_read_stops_neither_output_nor_commands_and_loses_nothing(unpaced: Wire) -> None:
    pod = unpaced.pod()
    stream, other = pod.open(), pod.open()
    sent = 0
    stream.sock.setblocking(False)
    pending = frame(1, b"x" * 8_000)

    def is_stuck() -> bool:
        nonlocal sent, pending
        try:
            while True:
                size = stream.sock.send(pending)
                sent += size
                pending = pending[size:] or frame(1, b"x" * 8_000)
        except BlockingIOError:
            return sent > 100_000

    wait_until(is_stuck, "nothing more is taken")
    assert pod.pings()
    pod.vm.send_frame(3, b"out")
    assert other.read_frame() == (3, b"out")
    pod.vm.send_frame(1, b"out")
    stream.sock.settimeout(10)
    assert stream.read_frame() == (1, b"out")
    with in_background(lambda: stream.sock.sendall(pending)):
        frames = (sent + len(pending)) // (FRAME.size + 8_000)
        assert pod.vm.take_stdin(1, frames * 8_000) == b"x" * (frames * 8_000)
    assert is_silent(stream.sock)


def _take(pod: Pod, streams: list[Stream], size: int) -> dict[int, bytes]:
    taken = {stream.base: bytearray() for stream in streams}
    while any(len(data) < size for data in taken.values()):
        seq, payload = pod.vm.next_frame()
        taken[seq] += payload
    return {base: bytes(data) for base, data in taken.items()}


def test_stdin_of_two_vms_does_not_mix(wire: Wire) -> None:
    first, second = wire.pod(), wire.pod()
    a, b = first.open(), second.open()
    a.send(b"first")
    b.send(b"second")
    assert second.vm.read_frame() == (1, b"second")
    assert first.vm.read_frame() == (1, b"first")
