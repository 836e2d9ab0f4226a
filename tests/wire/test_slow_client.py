"""A client that stops reading stops nobody else and loses nothing."""

from __future__ import annotations

from contextlib import suppress

from tests.wire.daemon import Wire
from tests.wire.support import MIB, Stream, frame, is_silent, refused, request, unread_by_peer, wait_until

CHUNK = 10_000


def chunks(base: int, count: int) -> bytes:
    """Frames that can be told from each other."""
    return b"".join(frame(base, b"%010d" % number * (CHUNK // 10)) for number in range(count))


def read_chunks(stream: Stream, count: int) -> None:
    for number in range(count):
        assert stream.read_frame() == (stream.base, b"%010d" % number * (CHUNK // 10))


def test_client_that_stops_reading_stops_no_other_stream_or_command_and_loses_no_byte(wire: Wire) -> None:
    pod = wire.pod()
    slow, other = pod.open(), pod.open(client=wire.attached(pod))
    pod.vm.io.sendall(chunks(slow.base, 800))  # 8 MB: far more than sockets hold
    pod.vm.send_frame(other.base, b"out")
    assert other.read_frame() == (other.base, b"out")
    other.send(b"in")
    assert pod.vm.read_frame() == (other.base, b"in")
    assert pod.pings()
    read_chunks(slow, 800)
    pod.vm.send_frame(slow.base, b"at once again")
    assert slow.read_frame().payload == b"at once again"


def test_what_waits_in_memory_is_bounded(wire: Wire) -> None:
    pod = wire.pod()
    slow = pod.open()
    pod.vm.io.sendall(chunks(slow.base, 100))
    before = wire.daemon.resident_bytes()
    pod.vm.io.sendall(chunks(slow.base, 3_000))
    wait_until(lambda: unread_by_peer(pod.vm.io) == 0, "all 30 MB are taken")
    assert wire.daemon.resident_bytes() - before < 12 * MIB
    slow.close()
    assert pod.pings()


def test_client_that_reads_now_and_then_gets_all_in_order(wire: Wire) -> None:
    pod = wire.pod()
    slow = pod.open()
    received = 0
    for start in range(0, 200, 20):
        for number in range(start, start + 20):
            pod.vm.send_frame(1, b"%010d" % number * (CHUNK // 10))
        for _ in range(15):
            assert slow.read_frame().payload == b"%010d" % received * (CHUNK // 10)
            received += 1
    for number in range(received, 200):
        assert slow.read_frame().payload == b"%010d" % number * (CHUNK // 10)


def test_exit_sequence_comes_behind_all_that_waited(wire: Wire) -> None:
    pod = wire.pod()
    slow = pod.open()
    pod.vm.io.sendall(chunks(1, 300) + frame(1) + frame(1, b"\7"))
    assert pod.pings()
    read_chunks(slow, 300)
    assert [slow.read_frame(), slow.read_frame()] == [(1, b""), (1, b"\7")]


def test_slow_client_gets_all_after_bye_and_the_end_of_the_vm(wire: Wire) -> None:
    pod = wire.pod()
    slow = pod.open(client=wire.attached(pod))
    pod.vm.io.sendall(chunks(1, 300))
    pod.client.bye(pod.container)
    pod.vm.io.sendall(frame(1) + frame(1, b"\7"))
    pod.vm.hang_up()
    assert not wire.is_registered(pod.container)
    read_chunks(slow, 300)
    assert [slow.read_frame(), slow.read_frame()] == [(1, b""), (1, b"\7")]
    assert slow.at_end()


def test_slow_client_that_goes_leaves_nothing_behind(wire: Wire) -> None:
    pod = wire.pod()
    slow, other = pod.open(client=wire.attached(pod)), pod.open(client=wire.attached(pod))
    pod.vm.io.sendall(chunks(1, 300))
    slow.close()
    pod.vm.io.sendall(chunks(1, 100) + frame(other.base, b"out"))
    assert other.read_frame().payload == b"out"


def test_several_slow_clients_do_not_wait_for_each_other(wire: Wire) -> None:
    pod = wire.pod()
    slow = [pod.open(1, client=wire.attached(pod)) for _ in range(4)]
    for stream in slow:
        pod.vm.io.sendall(chunks(stream.base, 150))
    for stream in reversed(slow):
        read_chunks(stream, 150)


def test_slow_client_may_still_send(wire: Wire) -> None:
    pod = wire.pod()
    slow = pod.open()
    pod.vm.io.sendall(chunks(1, 300))
    slow.send(b"x" * 1_000)
    assert pod.vm.take_stdin(1, 1_000) == b"x" * 1_000
    read_chunks(slow, 300)


def test_slow_vm_of_one_client_does_not_stop_another_vm(wire: Wire) -> None:
    pod, other = wire.pod(), wire.pod()
    slow, quick = pod.open(), other.open()
    pod.vm.io.sendall(chunks(1, 300))
    other.vm.send_frame(1, b"out")
    assert quick.read_frame().payload == b"out"
    assert other.pings()
    read_chunks(slow, 300)


def test_client_that_does_not_read_its_responses_stops_nobody(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.client()
    client.sock.setblocking(False)
    rest = memoryview(request("x") * 50_000)
    sent = len(rest)
    with suppress(BlockingIOError):
        while rest:
            rest = rest[client.sock.send(rest) :]
    assert pod.pings()
    client.sock.settimeout(10)
    complete = (sent - len(rest)) // len(request("x"))
    for _ in range(complete):
        assert client.receive() == refused("no payload named 'x'")
    assert is_silent(client.sock)


def test_client_that_goes_with_responses_unread_leaves_nothing_behind(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.client()
    client.sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            client.send(request("x") * 1_000)
    client.close()
    assert pod.pings()
