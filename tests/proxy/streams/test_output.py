"""From one VM to its clients, a step at a time: what is read, held, spooled, watched and said."""

from __future__ import annotations

import logging
import math
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.api.frames import MAX_FRAME
from cc_proxy.continuity.memory import BUFFER_SIZE, private_memory
from cc_proxy.linux.selector import WRITE, Selector
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.intake import Intake
from cc_proxy.proxy.streams.output import FramingLost, Output
from cc_proxy.proxy.streams.routes import Routes
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import SpoolSpace
from tests.proxy.conftest import Logged
from tests.proxy.support import (
    BLOCK,
    NEVER,
    frames_of,
    new_session,
    pair,
    read_now,
    spool_files,
    spool_space,
)
from tests.wire.support import Frame, frame, is_silent

PAUSED = "the VM is not read until its client reads"
FULL = "the spool is full"
UNUSABLE = "the spool cannot be used: "

SMALL = 4_608


class Bench:
    """An `Output` without a thread, and the other ends of its sockets."""

    def __init__(self, space: SpoolSpace) -> None:
        self._space = space
        self._stack = ExitStack()
        self.strays: list[int] = []
        self.routes = Routes(lambda _session: None)
        self.owners = self.routes.owners
        self.selector = Selector()
        near, self.vm = pair()
        near.setblocking(False)
        self.vm.setblocking(False)
        self.vm.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        memory = private_memory()
        self.intake = Intake(near, memory.output, memory.cell)
        self.output = Output("vm", self.intake, self.selector, self.routes, lambda: None, self._on_stray)
        for sock in (near, self.vm, self.selector):
            self._stack.callback(sock.close)

    def _on_stray(self, seq: int, _size: int) -> bool:
        self.strays.append(seq)
        return False

    def open(self, *, streams: int = 2, buffer: int | None = None) -> tuple[Session, socket.socket]:
        near, far = pair(buffer)
        base = max(self.owners, default=0) + 1
        session = new_session(range(base, base + streams), near, self._space)
        self.owners |= dict.fromkeys(session.seqs, session)
        self._stack.callback(far.close)
        self._stack.callback(session.close)
        return session, far

    def send(self, data: bytes) -> None:
        assert self.vm.send(data) == len(data)

    def pass_on(self, data: bytes) -> int:
        """Reads what the VM sends."""
        self.send(data)
        return self.output.read()

    def make_full(self, session: Session) -> bytes:
        """Output on a session's stream until its client's socket takes no more."""
        data = b""
        while not session.waits:
            more = frame(session.seqs.start, random.Random(len(data)).randbytes(2_000))
            self.pass_on(more)
            data += more
        return data

    def paused(self) -> bool:
        return bool(self.output.holding)

    def watched(self, session: Session) -> bool:
        watched = self.selector.watches(session.fd)
        assert watched == (self.output.waiting.get(session.fd) is session) == session.waits
        return watched

    def flush_all(self, session: Session, client: socket.socket) -> bytes:
        """What the client reads until nothing waits for it any more."""
        data = bytearray()
        while session.waits:
            data += read_now(client)
            assert (session.fd, WRITE) in self.selector.poll(0)
            self.output.flush(session)
        assert not self.watched(session)
        return bytes(data) + read_now(client)

    def close(self) -> None:
        self._stack.close()


BenchMaker = Callable[[SpoolSpace], Bench]


@pytest.fixture
def make_bench() -> Iterator[BenchMaker]:
    with ExitStack() as stack:

        def make(space: SpoolSpace) -> Bench:
            bench = Bench(space)
            stack.callback(bench.close)
            return bench

        yield make


@pytest.fixture
def bench(make_bench: BenchMaker, space: SpoolSpace) -> Bench:
    return make_bench(space)


def test_frames_go_to_who_owns_their_stream(bench: Bench) -> None:
    (_, one), (_, other) = bench.open(), bench.open()
    first, second, stray, third = (
        frame(1, b"out"),
        frame(3, b"other"),
        frame(9, b"nobody's"),
        frame(2, b"err"),
    )
    data = first + second + stray + third + frame(4)
    assert bench.pass_on(data) == len(data)
    assert read_now(one) == first + third
    assert read_now(other) == second + frame(4)
    assert bench.strays == [9]
    assert bench.output.bytes == len(data) - 20, "but nobody's"
    assert not bench.output.waiting
    assert not bench.paused()


def test_nothing_to_read_and_the_end(bench: Bench) -> None:
    with pytest.raises(BlockingIOError):
        bench.output.read()
    bench.vm.close()
    assert bench.output.read() == 0


def test_unfinished_frame_waits_for_its_rest(bench: Bench) -> None:
    _, client = bench.open()
    data = frame(1, b"one") + frame(1, b"two")
    bench.pass_on(data[:20])
    assert read_now(client) == data[:15]
    for at in range(20, len(data)):
        assert is_silent(client)
        bench.pass_on(data[at : at + 1])
    assert read_now(client) == data[15:]


def test_rest_is_delivered_behind_what_waits_even_while_paused(bench: Bench) -> None:
    """And an unfinished frame of it is nobody's."""
    _, client = bench.open()
    sent = bytearray()
    while not bench.output.holding:
        sent += (data := frame(1, bytes(10_000)) * 10)
        bench.send(data)
        bench.output.read()
    rest = frame(1, b"the rest")
    bench.send(rest + frame(1, b"cut off")[:15])
    bench.output.read_rest()
    assert bench.output.holding
    assert read_all_slowly(bench, client, len(sent) + len(rest)) == sent + rest


def read_all_slowly(bench: Bench, client: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += read_now(client)
        for session in list(bench.output.waiting.values()):
            bench.output.flush(session)
    return bytes(received)


def test_largest_frames_pass_wherever_they_begin_in_the_buffer(bench: Bench) -> None:
    _, client = bench.open()
    rng = random.Random(1)
    sent, received = bytearray(), bytearray()
    for number in range(40):
        payload = rng.randbytes(MAX_FRAME - 12 if number % 3 else rng.randrange(MAX_FRAME - 12))
        data = frame(1, payload)
        cut = rng.randrange(len(data))
        sent += data
        for part in (data[:cut], data[cut:]):
            if part:
                bench.pass_on(part)
            received += read_now(client)
    assert received == sent


def test_buffer_full_of_small_reads_is_used_from_its_begin_again(bench: Bench) -> None:
    """More than the buffer holds, with a frame unfinished all the time."""
    _, client = bench.open()
    rng = random.Random(2)
    data = b"".join(frame(rng.choice([1, 2]), rng.randbytes(rng.randrange(5_000))) for _ in range(300))
    assert len(data) > 2 * BUFFER_SIZE
    received = bytearray()
    at = 0
    while at < len(data):
        size = rng.randrange(1, 100_000)
        bench.pass_on(data[at : at + size])
        at += size
        received += read_now(client)
    assert received == data


@pytest.mark.parametrize("length", [0, 11, MAX_FRAME + 1, 2**32 - 1])
def test_lost_framing_is_an_error_behind_all_that_came_before(bench: Bench, length: int) -> None:
    _, client = bench.open()
    with pytest.raises(FramingLost, match=f"a frame on stream 7 with a total length of {length}"):
        bench.pass_on(frame(1, b"before") + frame(7, length=length) + frame(1, b"behind"))
    assert read_now(client) == frame(1, b"before")


def test_slow_client_is_waited_for_and_then_spooled_for(bench: Bench) -> None:
    session, client = bench.open(buffer=SMALL)
    sent = bench.make_full(session)
    assert bench.paused()
    assert bench.watched(session)
    until = bench.output.moment()
    assert until == session.patient_until
    bench.output.run_timers(until - 0.001)
    assert bench.paused()
    bench.output.run_timers(until)
    assert not bench.paused()
    assert bench.output.moment() == math.inf
    assert session.spooled
    assert bench.watched(session)
    more = frame(2, b"behind") * 100
    bench.pass_on(more)
    assert not bench.paused()
    assert bench.flush_all(session, client) == sent + more
    assert bench.output.pauses == 0


def test_client_that_reads_in_time_needs_no_spool(bench: Bench, tmp_path: Path) -> None:
    session, client = bench.open(buffer=SMALL)
    sent = bench.make_full(session)
    received = read_now(client)
    bench.output.flush(session)
    assert not bench.paused()
    assert received + bench.flush_all(session, client) == sent
    assert spool_files(tmp_path) == 0


def test_slow_client_holds_up_nobody_else(bench: Bench) -> None:
    (slow, slow_client), (_, client) = bench.open(buffer=SMALL), bench.open()
    sent = bench.make_full(slow)
    bench.output.run_timers(slow.patient_until)
    for number in range(100):
        to_slow, to_other = frame(1, b"%d" % number * 500), frame(3, b"%d" % number)
        bench.pass_on(to_slow + to_other)
        assert not bench.paused()
        assert read_now(client) == to_other
        sent += to_slow
    assert bench.flush_all(slow, slow_client) == sent


def test_full_spool_is_said_once_and_again_once_it_was_empty(
    make_bench: BenchMaker, tmp_path: Path, logged: Logged
) -> None:
    bench = make_bench(spool_space(tmp_path, session_limit=3 * BLOCK))
    session, client = bench.open(buffer=SMALL)
    for times in (1, 2):
        sent = bench.make_full(session)
        bench.output.run_timers(session.patient_until)
        assert not bench.paused()
        while not bench.paused():
            more = frame(1, bytes(3_000))
            bench.pass_on(more)
            sent += more
        bench.output.flush(session)  # the socket is full: nothing changes
        assert bench.paused()
        assert logged.at(logging.WARNING) == [PAUSED] * times
        assert bench.output.pauses == times
        assert bench.flush_all(session, client) == sent
        assert not bench.paused()
    assert (
        logged.fields(PAUSED)
        == [{"vm": "vm", "stream": 1, "pid": os.getpid(), "uid": os.geteuid(), "reason": FULL}] * 2
    )


def test_directory_that_is_missing_is_said_once_and_tried_again(
    make_bench: BenchMaker, tmp_path: Path, logged: Logged
) -> None:
    directory = tmp_path / "later"
    bench = make_bench(spool_space(directory))
    session, client = bench.open(buffer=SMALL)
    sent = bench.make_full(session)
    bench.output.run_timers(session.patient_until)
    for _ in range(5):
        bench.output.look()
        assert bench.paused()
        assert bench.output.moment() == math.inf
    assert logged.at(logging.WARNING) == [PAUSED]
    assert bench.output.pauses == 1
    reason = UNUSABLE + "No such file or directory"
    assert logged.fields(PAUSED) == [
        {"vm": "vm", "stream": 1, "pid": os.getpid(), "uid": os.geteuid(), "reason": reason}
    ]
    directory.mkdir()
    bench.output.look()
    assert not bench.paused()
    assert bench.flush_all(session, client) == sent


def test_missing_directory_is_no_matter_to_a_client_that_reads(
    make_bench: BenchMaker, tmp_path: Path
) -> None:
    bench = make_bench(spool_space(tmp_path / "missing"))
    session, client = bench.open(buffer=SMALL)
    for _ in range(3):
        sent = bench.make_full(session)
        bench.output.run_timers(session.patient_until)
        assert bench.flush_all(session, client) == sent
        assert not bench.paused()


def test_disk_that_is_full_in_the_middle_is_called_that(bench: Bench, logged: Logged, disk_size: int) -> None:
    """There is room for a part of what waits, as there nearly always is when a disk gets full."""
    session, client = bench.open(buffer=SMALL)
    sent = bench.make_full(session)
    bench.output.run_timers(session.patient_until)
    while not bench.paused():
        more = frame(1, bytes(3_000))
        bench.pass_on(more)
        sent += more
    assert session.spooled == disk_size
    (fields,) = logged.fields(PAUSED)
    assert str(fields["reason"]).startswith(UNUSABLE)
    assert bench.flush_all(session, client) == sent


@pytest.mark.parametrize("state", ["direct", "pending", "spooled", "full"])
def test_client_that_goes_leaves_nothing_watched_or_held(
    make_bench: BenchMaker, tmp_path: Path, state: str
) -> None:
    space = spool_space(tmp_path, session_limit=2 * BLOCK)
    bench = make_bench(space)
    (session, client), (_, other) = bench.open(buffer=SMALL), bench.open()
    if state != "direct":
        bench.make_full(session)
        assert bench.paused()
    if state in {"spooled", "full"}:
        bench.output.run_timers(session.patient_until)
        assert not bench.paused()
    if state == "full":
        while not bench.paused():
            bench.pass_on(frame(1, bytes(100)))
        assert session.spooled == 2 * BLOCK
    client.close()
    if session.waits:
        ((fd, events),) = bench.selector.poll(0)
        assert (fd, bool(events)) == (session.fd, True)
        bench.output.flush(session)
    else:
        bench.pass_on(frame(1, b"x"))
    assert session.output_gone
    assert not bench.watched(session)
    assert not bench.paused()
    assert (space.used, spool_files(tmp_path)) == (0, 0)
    bench.pass_on(frame(1, bytes(10_000)) + frame(3, b"out"))
    assert read_now(other) == frame(3, b"out")


@pytest.mark.parametrize("full", [False, True])
def test_forgotten_session_is_not_waited_for(make_bench: BenchMaker, tmp_path: Path, full: bool) -> None:
    bench = make_bench(spool_space(tmp_path, session_limit=0))
    session, _ = bench.open(buffer=SMALL)
    bench.make_full(session)
    if full:
        bench.output.run_timers(session.patient_until)
    assert bench.paused()
    bench.output.forget(session)
    assert not bench.paused()
    assert bench.output.waiting == {}
    assert not bench.selector.watches(session.fd)
    bench.output.forget(session)


def test_buffer_is_kept_as_long_as_slices_of_it_wait(make_bench: BenchMaker, tmp_path: Path) -> None:
    """Two clients are slow: the VM is read again when both of them have their part."""
    bench = make_bench(spool_space(tmp_path, session_limit=0))
    (one, one_client), (other, other_client) = bench.open(buffer=SMALL), bench.open(buffer=SMALL)
    to_one, to_other = frame(1, b"1" * 20_000), frame(3, b"2" * 20_000)
    bench.pass_on(to_one + to_other)
    assert bench.flush_all(one, one_client) == to_one
    assert bench.paused()
    assert bench.flush_all(other, other_client) == to_other
    assert not bench.paused()


def test_frames_are_dumped_once_each_whoever_they_are_for(bench: Bench, logged: Logged) -> None:
    bench.open()
    data = frame(1, b"mine") + frame(5, b"nobody's") + frame(2, b"in two reads")
    bench.pass_on(data[:-5])
    assert logged.fields("frame") == [], "only at that level"
    logger.setLevel(IO)
    bench.pass_on(data[-5:] + data[:-5])
    bench.pass_on(data[-5:])
    assert [(fields["stream"], fields["payload"]) for fields in logged.fields("frame")] == [
        (2, "'in two reads'"),
        (1, "'mine'"),
        (5, '"nobody\'s"'),
        (2, "'in two reads'"),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_every_byte_for_clients_of_any_speed(make_bench: BenchMaker, tmp_path: Path, seed: int) -> None:
    """The loop of the pump, without its clock: clients read now and then, and the spool is small."""
    rng = random.Random(seed)
    limit = [0, 3 * BLOCK, 256 * BLOCK][seed % 3]
    bench = make_bench(spool_space(tmp_path, session_limit=limit, total_limit=max(8 * BLOCK, limit)))
    sessions = [bench.open(buffer=SMALL) for _ in range(4)]
    sent = {session: bytearray() for session, _ in sessions}
    received = {session: bytearray() for session, _ in sessions}
    on_the_way = bytearray()
    pauses = 0

    def turn(appetite: float) -> None:
        nonlocal pauses
        for session, client in sessions:
            if rng.random() < appetite and not is_silent(client):
                received[session] += client.recv(rng.choice([100, 3_000, 50_000]))
        for fd, _ in bench.selector.poll(0):
            bench.output.flush(bench.output.waiting[fd])
        bench.output.run_timers(NEVER * 1e6)
        pauses += bench.paused()
        if on_the_way and not bench.paused():
            size = rng.randrange(1, 30_000)
            bench.send(bytes(on_the_way[:size]))
            del on_the_way[:size]
            bench.output.read()

    for _ in range(300):
        session, _ = rng.choice(sessions)
        data = frame(rng.choice(session.seqs), rng.randbytes(rng.randrange(2_000)))
        sent[session] += data
        on_the_way += data
        turn(0.1)
    while on_the_way or any(session.waits for session, _ in sessions):
        turn(0.5)
    for session, client in sessions:
        received[session] += read_now(client)
        assert received[session] == sent[session]
        assert frames_of(bytes(received[session]))[-1] == Frame(*frames_of(bytes(sent[session]))[-1])
        assert not bench.watched(session)
    assert bool(pauses) == (limit < 1_000_000)
    assert spool_files(tmp_path) == 0
