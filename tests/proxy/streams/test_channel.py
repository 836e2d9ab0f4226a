"""A channel without a thread, step by step: every state a client, a VM or its own end can be in."""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from cc_proxy.api.status import Streams, WaitingStream
from cc_proxy.continuity.memory import private_memory
from cc_proxy.hyperstart.codes import Code
from cc_proxy.linux.selector import Selector
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.proxy.spin import Spin
from cc_proxy.proxy.streams.channel import Channel
from cc_proxy.proxy.streams.interfaces import Pacing, Sockets
from cc_proxy.proxy.streams.mailbox import Mailbox
from cc_proxy.proxy.streams.outlet import Outlet
from cc_proxy.proxy.streams.output import Output
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.streams.stdin import Stdin
from cc_proxy.proxy.vms.commands import Asked
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control_socket import ControlLost
from tests.clock import Clock
from tests.faults import broken
from tests.proxy.conftest import Logged
from tests.proxy.support import (
    BLOCK,
    NEVER,
    Ends,
    fill,
    frames_of,
    open_fds,
    pair,
    read_frames,
    read_now,
    spool_files,
    spool_space,
)
from tests.shortages import disk_full_after
from tests.wire.support import (
    ASYNC_EVENT,
    FRAME,
    MARKER,
    WAIT,
    Frame,
    Stream,
    at_end,
    command,
    frame,
    in_background,
    is_silent,
    read_exact,
    unread_by_peer,
)

T = TypeVar("T")

SMALL = 4_608
WINDOW = 512
ECHO_TIMEOUT = 10.0
#: Longer than any client is waited for, and shorter than anything else takes.
A_MOMENT = 0.5

HUNG_UP = "the VM hung up its I/O channel"
PAUSED = "the VM is not read until its client reads"
MINE = {"pid": os.getpid(), "uid": os.geteuid()}


class Bench(Ends):
    """A channel that is driven step by step, the far ends of all its sockets, and its clock."""

    def __init__(
        self,
        space: SpoolSpace,
        clock: Clock,
        *,
        window: int = 0,
        io_buffer: int | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__(space, window=window, io_buffer=io_buffer)
        self._clock = clock
        self.mailbox = Mailbox()
        #: What asks the agent on the control channel, by what it calls back.
        self.rounds: list[Callable[[bool], None]] = []
        self.commands = 0  # how many the last of them has
        pacing = Pacing(ECHO_TIMEOUT if window else NEVER, self._note_round)
        self.channel = Channel(
            self.owner,
            Sockets(self.near_io, self.control, console),
            private_memory(),
            self.mailbox,
            pacing,
        )
        self._closing = ExitStack()
        self._closing.callback(self.channel.close)
        self._closing.callback(self.mailbox.close)

    def _note_round(self, commands: int, call_back: Callable[[bool], None]) -> None:
        self.commands = commands
        self.rounds.append(call_back)

    def open(self, streams: int = 2, *, buffer: int | None = None) -> Stream:
        session, stream = self.session(streams, buffer=buffer)
        self.channel.add(session)
        self.channel.open_stdin([stream.base])
        return stream

    def step(self) -> None:
        """Wait until something is ready, and serve it."""
        self.channel.serve(self.channel.wait())

    def turn(self) -> None:
        """A step, whether there is anything to do or not."""
        self.mailbox.post(lambda: None)
        self.step()

    def settle(self) -> None:
        """As many turns as anything changes in. Time stands still meanwhile."""
        before = None
        while (now := (self.streams(), set(self.owner.causes), len(self.events))) != before:
            before = now
            self.turn()

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds
        self.settle()

    def finish(self, after: float = 0.0) -> None:
        self.channel.finish_by(self._clock.now + after, "the test ends")

    def is_at_rest(self) -> bool:
        """Whether it sleeps, as there is nothing that it could do, until it is time to finish."""
        self.finish(0.01)
        begun = time.monotonic()
        return self.channel.wait() == [] and time.monotonic() - begun >= 0.01

    def streams(self) -> Streams:
        return self.channel.describe()

    def waiting(self, stream: Stream) -> WaitingStream | None:
        """What waits for a client, if anything does."""
        return next((found for found in self.streams().waiting if found.stream == stream.base), None)

    def spooled(self, stream: Stream) -> int:
        found = self.waiting(stream)
        return found.spooled if found else 0

    def paused(self) -> bool:
        return self.streams().paused

    def blocked(self) -> bool:
        return self.streams().stdin_held > 0

    def say(self, data: bytes) -> None:
        """Have the VM send what fits into its socket, and serve it."""
        self.io.sendall(data)
        self.settle()

    def stall(self, stream: Stream) -> bytes:
        """Output on a stream until its client takes no more; returns it."""
        sent = b""
        while not self.waiting(stream):
            more = numbered(stream.base, 5)
            self.say(more)
            sent += more
        self.pass_time(A_MOMENT)
        return sent

    def read(self, sock: socket.socket, size: int) -> bytes:
        """That much of what arrives at a far end."""
        data = bytearray()
        while len(data) < size:
            self.settle()
            assert not is_silent(sock), f"no more than {len(data)} of {size} bytes come"
            data += read_exact(sock, min(size - len(data), max(1, unread(sock))))
        self.settle()
        return bytes(data)

    def read_to_end(self, sock: socket.socket) -> bytes:
        """All that arrives at a far end, which has to come to an end. A reset is none."""
        data = bytearray()
        while True:
            self.settle()
            assert not is_silent(sock), f"no end comes after {len(data)} bytes"
            piece = sock.recv(1 << 20)
            if not piece:
                return bytes(data)
            data += piece

    def at_end(self, sock: socket.socket) -> bool:
        return self.read_to_end(sock) == b""

    def read_frame(self, stream: Stream) -> Frame:
        self.settle()
        assert not is_silent(stream.sock)
        return stream.read_frame()

    def frames(self) -> list[Frame]:
        """All that the VM is sent."""
        self.settle()
        return frames_of(read_now(self.io))

    def acknowledge_once(self) -> None:
        """Let it know that the agent sends markers back."""
        stream = self.open()
        stream.send(bytes(WINDOW))
        marker = self.frames()[-1]
        assert marker.seq >= MARKER
        self.say(frame(marker.seq))
        stream.close()
        self.frames()
        assert self.streams().sessions == 0

    def end(self) -> None:
        """Close the channel."""
        self._closing.close()

    def close(self) -> None:
        super().close()
        self.end()


def numbered(seq: int, count: int, size: int = 2_000) -> bytes:
    """Frames that can be told from each other."""
    return b"".join(frame(seq, (b"%d " % number * size)[:size]) for number in range(count))


def unread(sock: socket.socket) -> int:
    """Bytes that have arrived."""
    return len(sock.recv(1 << 20, socket.MSG_PEEK))


BenchMaker = Callable[..., Bench]


@pytest.fixture
def make_bench(clock: Clock, tmp_path: Path) -> Iterator[BenchMaker]:
    """Channels with spools of so many bytes, or with this one spool."""
    with ExitStack() as stack:

        def make(
            space: SpoolSpace | int = 1 << 20,
            *,
            window: int = 0,
            io_buffer: int | None = None,
            console: Console | None = None,
        ) -> Bench:
            if isinstance(space, int):
                space = spool_space(tmp_path, session_limit=space)
            bench = Bench(space, clock, window=window, io_buffer=io_buffer, console=console)
            return stack.enter_context(bench)

        yield make


@pytest.fixture
def bench(make_bench: BenchMaker) -> Bench:
    """Without pacing."""
    return make_bench()


@pytest.fixture
def pacing(make_bench: BenchMaker) -> Bench:
    """With an agent that is known to send markers back."""
    bench = make_bench(5 * BLOCK, window=WINDOW)
    bench.acknowledge_once()
    return bench


# Delivery -------------------------------------------------------------------------------------------------


def test_frames_go_both_ways_a_step_each(bench: Bench) -> None:
    one, other = bench.open(), bench.open()
    bench.io.sendall(frame(one.base, b"out") + frame(other.base + 1, b"err") + frame(99, b"nobody's"))
    bench.step()
    assert one.read_frame() == (1, b"out")
    assert other.read_frame() == (4, b"err")
    other.send(b"in")
    bench.step()
    assert read_frames(bench.io, 1) == [(3, b"in")]
    traffic = bench.streams().traffic
    assert (traffic.bytes_to_clients, traffic.bytes_to_vm) == (2 * 12 + 6, 14)
    assert (traffic.frames_to_clients, traffic.frames_to_vm) == (2, 1)
    assert (traffic.stray_frames, traffic.pauses) == (1, 0)
    assert bench.streams().sessions == bench.channel.session_count == 2


def test_session_in_the_mailbox_gets_what_the_vm_sends_for_it(bench: Bench) -> None:
    """Whoever learns its seq may have the VM send at once."""
    session, stream = bench.session()
    bench.mailbox.post(lambda: bench.channel.add(session))
    bench.io.sendall(frame(stream.base, b"at once"))
    bench.step()
    assert stream.read_frame().payload == b"at once"


def test_session_that_comes_while_the_vm_is_about_to_be_read_gets_its_frames(bench: Bench) -> None:
    first = bench.open()
    session, second = bench.session()
    bench.io.sendall(frame(first.base, b"first"))
    ready = bench.channel.wait()
    bench.mailbox.post(lambda: bench.channel.add(session))
    bench.io.sendall(frame(second.base, b"at once"))
    bench.channel.serve(ready)
    assert first.read_frame().payload == b"first"
    assert second.read_frame().payload == b"at once"
    assert bench.streams().traffic.stray_frames == 0


def test_markers_that_nobody_waits_for_and_frames_that_nobody_owns_are_told_apart(bench: Bench) -> None:
    bench.say(frame(7) + frame(MARKER + 1) + frame(MARKER - 1) + frame(2**64 - 1))
    assert bench.streams().traffic.stray_frames == 2


# Slow clients ---------------------------------------------------------------------------------------------


def test_stalled_client_among_live_ones(bench: Bench, tmp_path: Path) -> None:
    stalled, *live = (bench.open(buffer=SMALL) for _ in range(4))
    sent = bench.stall(stalled)
    for number in range(50):
        data = b"%d" % number
        more = frame(stalled.base, data * 700)
        bench.io.sendall(more + b"".join(frame(stream.base, data) for stream in live))
        sent += more
        for stream in live:
            assert bench.read_frame(stream) == (stream.base, data)
            stream.send(data)
        assert sorted(bench.frames()) == sorted(Frame(stream.base, data) for stream in live)
    assert spool_files(tmp_path) > 0
    assert bench.read(stalled.sock, len(sent)) == sent
    assert not bench.streams().waiting
    assert spool_files(tmp_path) == 0
    bench.say(frame(stalled.base, b"direct again"))
    assert stalled.read_frame() == (stalled.base, b"direct again")
    assert bench.space.used == 0


def test_patience_ends_without_anything_happening(bench: Bench, clock: Clock) -> None:
    stalled, live = bench.open(buffer=SMALL), bench.open()
    bench.say(numbered(stalled.base, 20))
    assert bench.paused()
    assert bench.spooled(stalled) == 0
    assert bench.channel.wait() == [], "it waits no longer than that"
    clock.now += A_MOMENT
    bench.channel.serve([])
    assert bench.spooled(stalled) > 0
    bench.say(frame(live.base, b"out"))
    assert live.read_frame() == (live.base, b"out")


def test_client_that_waits_is_described(bench: Bench, clock: Clock) -> None:
    stream = bench.open(buffer=SMALL)
    bench.say(numbered(stream.base, 20))
    clock.now += 0.01
    (waiting,) = bench.streams().waiting
    assert (waiting.stream, waiting.pid, waiting.uid) == (stream.base, *MINE.values())
    assert (waiting.holds_vm, waiting.spooled, waiting.reason) == (True, 0, "")
    assert waiting.pending == bench.streams().pending > 0
    assert waiting.idle == pytest.approx(0.01)
    bench.pass_time(A_MOMENT)
    (waiting,) = bench.streams().waiting
    assert (waiting.holds_vm, waiting.pending) == (False, 0)
    assert waiting.spooled == bench.streams().spooled > 0


def test_full_spool_pauses_the_vm_and_resumes(make_bench: BenchMaker, logged: Logged) -> None:
    bench = make_bench(5 * BLOCK)
    stalled, live = bench.open(buffer=SMALL), bench.open()
    sent = numbered(stalled.base, 49)
    bench.say(sent + frame(live.base, b"behind"))
    bench.pass_time(A_MOMENT)
    bench.say(frame(live.base, b"last"))
    assert bench.paused()
    assert bench.streams().traffic.pauses == 1
    live.send(b"in")  # the other direction flows
    assert bench.frames() == [(live.base, b"in")]
    bench.ctl.sendall(command(ASYNC_EVENT, b"{}"))  # and so does the control channel
    bench.settle()
    assert bench.events[-1].code == ASYNC_EVENT
    assert bench.paused()
    assert bench.read(stalled.sock, len(sent)) == sent
    assert [live.read_frame(), live.read_frame()] == [(live.base, b"behind"), (live.base, b"last")]
    assert set(logged.at(logging.WARNING)) == {PAUSED}
    assert bench.space.used == 0


def greedy_and_other(make_bench: BenchMaker, tmp_path: Path) -> tuple[Bench, Stream, bytes, Bench]:
    """A VM with a client that takes the whole spool, that client, what it was sent; and another VM."""
    space = spool_space(tmp_path, total_limit=8 * BLOCK)
    bench, other = make_bench(space), make_bench(space)
    greedy, sent = bench.open(buffer=SMALL), numbered(1, 50)
    bench.say(sent)
    bench.pass_time(A_MOMENT)
    return bench, greedy, sent, other


def test_total_limit_is_shared_by_the_vms(make_bench: BenchMaker, tmp_path: Path) -> None:
    bench, greedy, sent, other = greedy_and_other(make_bench, tmp_path)
    modest = other.open(buffer=SMALL)
    assert bench.paused(), "the first has taken it all"
    assert bench.space.used == 8 * BLOCK
    more = other.stall(modest)
    assert other.paused(), "nothing is left for the second"
    assert bench.space.used == 8 * BLOCK
    assert other.read(modest.sock, len(more)) == more
    assert not other.paused()
    assert bench.read(greedy.sock, len(sent)) == sent
    assert bench.space.used == 0


def test_room_that_others_have_made_in_the_spool_is_used_within_a_second(
    make_bench: BenchMaker, tmp_path: Path
) -> None:
    bench, greedy, sent, other = greedy_and_other(make_bench, tmp_path)
    modest = other.open(buffer=SMALL)
    more = other.stall(modest)
    assert other.paused()
    assert bench.read(greedy.sock, len(sent)) == sent
    assert other.paused()
    other.pass_time(1)
    assert not other.paused()
    assert other.read(modest.sock, len(more)) == more


def test_missing_spool_directory_is_logged_once_and_loses_nothing(
    make_bench: BenchMaker, tmp_path: Path, logged: Logged
) -> None:
    bench = make_bench(spool_space(tmp_path / "missing"))
    stalled = bench.open(buffer=SMALL)
    sent = numbered(1, 50)
    bench.say(sent)
    for _ in range(3):
        bench.pass_time(A_MOMENT)
        assert bench.paused()
    stalled.send(b"in")
    assert bench.frames() == [(1, b"in")]
    assert logged.at(logging.WARNING) == [PAUSED]
    assert bench.streams().traffic.pauses == 1
    assert bench.read(stalled.sock, len(sent)) == sent
    assert not bench.paused()


def test_spool_that_breaks_in_any_way_is_said_and_loses_nothing(bench: Bench, logged: Logged) -> None:
    stream = bench.open(buffer=SMALL)
    with disk_full_after(0):
        bench.say(numbered(1, 10))
        bench.pass_time(A_MOMENT)
        assert bench.paused()
        reason = "the spool cannot be used: File too large"
        assert logged.fields(PAUSED) == [{"vm": "vm", "stream": 1, **MINE, "reason": reason}]
        assert bench.read(stream.sock, len(numbered(1, 10))) == numbered(1, 10)
    assert not bench.owner.causes


class Traffic:
    """An agent, and clients that read and send at their own speed; every byte is checked."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self._bench = bench
        self._rng = rng
        self.streams = [bench.open(buffer=SMALL if number % 2 else None) for number in range(4)]
        self._left = {stream.base: rng.randbytes(250_000) for stream in self.streams}
        self._said = {stream.base: bytearray() for stream in self.streams}
        self._up = {stream.base: rng.randbytes(20_000) for stream in self.streams}
        self._to_send = {
            stream.base: b"".join(
                frame(stream.base, self._up[stream.base][at : at + 900]) for at in range(0, 20_000, 900)
            )
            for stream in self.streams
        }
        self._to_say = bytearray()
        self._read = {stream.base: bytearray() for stream in self.streams}
        self._taken = bytearray()
        self._got = dict.fromkeys(self._up, b"")
        for sock in (bench.io, *(stream.sock for stream in self.streams)):
            sock.setblocking(False)

    def turn(self) -> bool:
        """Everybody does a little; returns whether there is more to do."""
        self._say()
        self._take()
        for stream in self.streams:
            self._send(stream)
            if self._rng.random() < 0.3:
                self._receive(stream)
        self._bench.turn()
        return not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether everything has arrived."""
        return not any(self._left.values()) and self._got == self._up and self._read == self._said

    def _say(self) -> None:
        seq, size = self._rng.choice(list(self._left)), self._rng.randrange(1, 8_000)
        if self._left[seq] and len(self._to_say) < 50_000:
            said = frame(seq, self._left[seq][:size])
            self._to_say += said
            self._said[seq] += said
            self._left[seq] = self._left[seq][size:]
        with suppress(BlockingIOError):
            del self._to_say[: self._bench.io.send(self._to_say)]

    def _take(self) -> None:
        self._taken += read_now(self._bench.io)
        while len(self._taken) >= FRAME.size and len(self._taken) >= FRAME.unpack_from(self._taken)[1]:
            seq, length = FRAME.unpack_from(self._taken)
            if seq >= MARKER:
                self._to_say += frame(seq)
            else:
                self._got[seq] += self._taken[FRAME.size : length]
                assert self._up[seq].startswith(self._got[seq])
            del self._taken[:length]

    def _send(self, stream: Stream) -> None:
        left = self._to_send[stream.base]
        with suppress(BlockingIOError):
            sent = stream.sock.send(left[: self._rng.randrange(1, 3_000)])
            self._to_send[stream.base] = left[sent:]

    def _receive(self, stream: Stream) -> None:
        if not is_silent(stream.sock):
            self._read[stream.base] += stream.sock.recv(self._rng.choice([50, 2_000, 60_000]))


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_at_any_speed(make_bench: BenchMaker, tmp_path: Path, clock: Clock, seed: int) -> None:
    """Both directions, two VMs that share the spool, which is often full."""
    most = [100, 3, 0][seed % 3] * BLOCK
    space = spool_space(tmp_path, session_limit=most, total_limit=4 * most)
    benches = [make_bench(space, window=[0, WINDOW][seed % 2]) for _ in range(2)]
    rng = random.Random(seed)
    traffic = [Traffic(bench, rng) for bench in benches]
    for _ in range(20_000):
        clock.now += rng.choice([0.0, 0.001, 0.1])
        traffic = [each for each in traffic if each.turn()]
        if not traffic:
            break
    assert not traffic, "it never comes to an end"
    assert any(bench.streams().traffic.pauses for bench in benches) == (seed % 3 > 0)
    assert space.used == 0
    assert spool_files(tmp_path) == 0


@pytest.mark.parametrize("spooled", [False, True])
def test_output_that_cannot_be_passed_on_is_said_and_its_client_sees_the_end(
    bench: Bench, logged: Logged, spooled: bool
) -> None:
    error = OSError(errno.EIO, "Input/output error")
    stream, other = bench.open(buffer=SMALL), bench.open()
    if spooled:
        bench.stall(stream)
        assert bench.spooled(stream)
    with broken(os, "sendfile", error), broken(Outlet, "send", error):
        if not spooled:
            bench.say(frame(stream.base, b"lost"))
        bench.read_to_end(stream.sock)
    assert bench.streams().sessions == 1
    assert logged.fields("output lost: its stream is closed") == [
        {"vm": "vm", "stream": stream.base, **MINE, "error": "Input/output error"}
    ]
    bench.say(frame(other.base, b"x"))
    assert other.read_frame().payload == b"x"
    assert bench.space.used == 0
    assert not bench.owner.causes


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
@pytest.mark.parametrize("space", [1 << 20, 3 * BLOCK])
def test_kernel_that_is_short_of_memory_costs_time_and_no_byte(
    make_bench: BenchMaker, monkeypatch: pytest.MonkeyPatch, clock: Clock, number: int, space: int
) -> None:
    bench, rng = make_bench(space, window=WINDOW), random.Random(number)
    traffic = Traffic(bench, rng)
    theirs = {bench.io.fileno(), *(stream.sock.fileno() for stream in traffic.streams)}
    failures: Counter[str] = Counter()

    def fail_now_and_then(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def attempt(sock: socket.socket | int, *arguments: object) -> object:
            if (sock if isinstance(sock, int) else sock.fileno()) not in theirs and rng.random() < 0.3:
                failures[name] += 1
                raise OSError(number, os.strerror(number))
            return call(sock, *arguments)

        monkeypatch.setattr(owner, name, attempt)

    fail_now_and_then(os, "sendfile")
    for name in ("send", "sendmsg", "recv_into"):
        fail_now_and_then(socket.socket, name)
    for _ in range(20_000):
        clock.now += 0.1
        if not traffic.turn():
            break
    assert traffic.is_over
    assert all(failures[name] for name in ("sendfile", "send", "sendmsg", "recv_into"))
    assert len(clock.slept) == failures.total(), "nothing but that keeps it from trying all the time"
    assert bench.owner.causes == []


def refuse_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the kernel watches no more fds."""

    def refuse(selector: Selector, fd: int, events: int) -> None:
        raise OSError(errno.ENOSPC, "fs.epoll.max_user_watches is reached")

    monkeypatch.setattr(Selector, "add", refuse)


def client_that_comes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Stream:
    refuse_watches(monkeypatch)
    return bench.open()


def client_that_stops_reading(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = bench.open(buffer=SMALL)
    refuse_watches(monkeypatch)
    bench.say(numbered(stream.base, 10))
    return stream


def client_that_went_before_its_stdin_was_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = bench.open()
    stream.send(bytes(2 * WINDOW))
    *_, marker = bench.frames()
    stream.sock.shutdown(socket.SHUT_RDWR)
    bench.settle()
    refuse_watches(monkeypatch)
    bench.say(frame(marker.seq))
    return stream


@pytest.mark.parametrize(
    "come_to_need_one",
    [client_that_comes, client_that_stops_reading, client_that_went_before_its_stdin_was_read],
)
def test_watches_that_have_run_out_cost_the_client_alone_who_needs_one(
    pacing: Bench,
    monkeypatch: pytest.MonkeyPatch,
    logged: Logged,
    come_to_need_one: Callable[[Bench, pytest.MonkeyPatch], Stream],
) -> None:
    bench = pacing
    other = bench.open()
    stream = come_to_need_one(bench, monkeypatch)
    bench.frames()
    bench.read_to_end(stream.sock)
    assert bench.streams().sessions == 1
    assert logged.fields("output lost: its stream is closed") == [
        {"vm": "vm", "stream": stream.base, **MINE, "error": "fs.epoll.max_user_watches is reached"}
    ]
    other.send(b"in")
    assert bench.frames() == [(other.base, b"in")]
    bench.say(frame(other.base, b"out"))
    assert other.read_frame() == (other.base, b"out")
    assert bench.owner.causes == []
    assert bench.space.used == 0
    monkeypatch.undo()
    assert bench.open().sock.fileno() >= 0


# Clients that go ------------------------------------------------------------------------------------------

STATES = ["direct", "pending", "spooled", "full"]


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> str:
    """What a session is in when something happens."""
    return str(request.param)


@pytest.fixture
def tight_bench(state: str, make_bench: BenchMaker) -> Bench:
    """Whose spool is as small as that state needs."""
    return make_bench(5 * BLOCK if state == "full" else 1_000_000)


def bring_into(state: str, bench: Bench, stream: Stream) -> bytes:
    """Output on a stream until its session is in this state; returns all of it."""
    if state == "direct":
        sent = numbered(stream.base, 3, size=1_000)
        bench.say(sent)
        assert not bench.streams().waiting
        return sent
    sent = numbered(stream.base, 50)
    # The channel has read a part of a frame, and the rest of it may be in the socket.
    bench.say(sent[:60_007])
    if state != "pending":
        bench.pass_time(A_MOMENT)
    bench.say(sent[60_007:])
    if state == "spooled":
        assert not bench.paused()
        assert bench.spooled(stream) > 60_007
        assert unread_by_peer(bench.io) == 0
    else:
        assert bench.paused()
        assert bench.spooled(stream) == (5 * BLOCK if state == "full" else 0)
        assert unread_by_peer(bench.io)
    return sent


@pytest.mark.parametrize("stdin", [b"", b"typed"])
@pytest.mark.parametrize("how", ["closed", "broke the protocol"])
def test_client_that_goes_leaves_the_others_alone(
    tight_bench: Bench, state: str, how: str, stdin: bytes, tmp_path: Path
) -> None:
    bench = tight_bench
    leaver, other = bench.open(buffer=SMALL), bench.open()
    bring_into(state, bench, leaver)
    if stdin:
        leaver.send(stdin)
    if how == "closed":
        leaver.close()
    else:
        leaver.sock.sendall(frame(other.base, b"not mine"))
    bench.settle()
    assert bench.streams().sessions == 1
    bench.say(frame(other.base, b"out") + numbered(leaver.base, 50) + frame(other.base, b"more"))
    assert [other.read_frame(), other.read_frame()] == [(other.base, b"out"), (other.base, b"more")]
    other.send(b"in")
    expected = [Frame(leaver.base, stdin)] * bool(stdin)
    expected += [Frame(leaver.base, b"")] * bool(stdin and how == "closed")
    assert bench.frames() == [*expected, Frame(other.base, b"in")]
    assert (bench.space.used, spool_files(tmp_path)) == (0, 0)
    assert not bench.paused()
    assert not bench.streams().waiting
    assert bench.owner.causes == []


@pytest.mark.parametrize("state", ["direct", "spooled"], indirect=True)
def test_client_that_takes_no_more_may_still_send(tight_bench: Bench, state: str) -> None:
    bench = tight_bench
    stream, other = bench.open(buffer=SMALL), bench.open()
    bring_into(state, bench, stream)
    stream.sock.shutdown(socket.SHUT_RD)
    bench.say(frame(stream.base, b"to nobody") + frame(other.base, b"out"))
    assert other.read_frame() == (other.base, b"out")
    stream.send(b"in")
    assert bench.frames() == [(stream.base, b"in")]
    stream.sock.shutdown(socket.SHUT_WR)
    assert bench.frames() == [(stream.base, b"")]
    assert bench.streams().sessions == 1


def test_client_that_takes_no_more_is_given_up_and_may_still_send(
    tight_bench: Bench, state: str, tmp_path: Path
) -> None:
    """Nothing comes for it any more that would tell, and its VM may be waiting for it."""
    bench = tight_bench
    stream, other = bench.open(buffer=SMALL), bench.open()
    bring_into(state, bench, stream)
    stream.sock.shutdown(socket.SHUT_RD)
    bench.pass_time(1)
    assert (bench.space.used, spool_files(tmp_path)) == (0, 0)
    assert not bench.paused()
    assert not bench.streams().waiting
    bench.say(frame(other.base, b"out") + numbered(stream.base, 50))
    assert other.read_frame() == (other.base, b"out")
    stream.send(b"in")
    assert bench.frames() == [(stream.base, b"in")]
    assert bench.owner.causes == []


def test_client_of_a_lost_vm_that_takes_no_more_keeps_nothing(
    tight_bench: Bench, state: str, tmp_path: Path
) -> None:
    bench = tight_bench
    stream = bench.open(buffer=SMALL)
    bring_into(state, bench, stream)
    bench.io.close()
    bench.settle()
    stream.sock.shutdown(socket.SHUT_RD)
    bench.pass_time(1)
    assert not bench.channel.is_in_use
    assert (bench.space.used, spool_files(tmp_path)) == (0, 0)
    with pytest.raises(BrokenPipeError):
        stream.send(b"in")


def test_half_closed_client_gets_its_output(tight_bench: Bench, state: str) -> None:
    bench = tight_bench
    stream = bench.open(buffer=SMALL)
    sent = bring_into(state, bench, stream)
    stream.send(b"last")
    stream.sock.shutdown(socket.SHUT_WR)
    assert bench.frames() == [(stream.base, b"last"), (stream.base, b"")]
    more = frame(stream.base) + frame(stream.base, b"\7")
    bench.io.sendall(more)
    assert bench.read(stream.sock, len(sent + more)) == sent + more
    stream.close()
    bench.settle()
    assert not bench.streams().sessions


@pytest.mark.parametrize("part", [Output, Stdin])
def test_error_in_the_middle_of_letting_a_session_go_leaks_nothing(
    bench: Bench, part: type[Output | Stdin]
) -> None:
    stream = bench.open()
    stream.sock.sendall(frame(99))
    with broken(part, "forget"), pytest.raises(KeyError):
        bench.step()
    assert at_end(stream.sock)


# A VM that goes -------------------------------------------------------------------------------------------


def close_io(bench: Bench) -> None:
    bench.io.close()


def send_no_more(bench: Bench) -> None:
    bench.io.shutdown(socket.SHUT_WR)


def lose_framing(bench: Bench) -> None:
    bench.io.sendall(frame(1, length=5))


def close_control(bench: Bench) -> None:
    bench.ctl.close()


def talk_nonsense(bench: Bench) -> None:
    bench.ctl.sendall(command(9, length=3))


def finish(bench: Bench) -> None:
    bench.finish()


ENDS = [close_io, send_no_more, lose_framing, close_control, talk_nonsense, finish]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stdin", ["none", "before", "after"])
def test_clients_get_all_that_was_sent_and_then_its_end(
    tight_bench: Bench, state: str, end: Callable[[Bench], None], stdin: str, tmp_path: Path
) -> None:
    """Whatever was waiting for them, however the VM goes, and though they send something meanwhile."""
    bench = tight_bench
    stream, idle, typist = bench.open(buffer=SMALL), bench.open(), bench.open()
    sent = bring_into(state, bench, stream)
    if stdin == "before":
        typist.send(b"typed")
        bench.settle()
        assert bench.streams().traffic.bytes_to_vm > 0
    end(bench)
    if stdin == "after":
        for _ in range(3):
            with suppress(OSError):
                typist.send(b"typed")
            bench.turn()
    assert bench.read_to_end(stream.sock) == sent
    assert bench.at_end(idle.sock)
    assert bench.at_end(typist.sock)
    assert not bench.channel.is_in_use
    assert bench.owner.causes
    assert (bench.space.used, spool_files(tmp_path)) == (0, 0)


@pytest.mark.parametrize(
    ("end", "causes"),
    [
        (close_io, {HUNG_UP}),
        (send_no_more, {HUNG_UP}),
        (lose_framing, {"I/O channel: a frame on stream 1 with a total length of 5"}),
        (close_control, {"the VM hung up its control channel"}),
        (talk_nonsense, {"control channel: ack with a total length of 3"}),
        (finish, {"the test ends"}),
    ],
)
def test_the_cause_is_told(bench: Bench, end: Callable[[Bench], None], causes: set[str]) -> None:
    stream = bench.open()
    end(bench)
    assert bench.at_end(stream.sock)
    assert set(bench.owner.causes) == causes


def test_vm_that_takes_no_more_is_lost_when_something_is_sent(bench: Bench) -> None:
    stream = bench.open()
    bench.io.shutdown(socket.SHUT_RD)
    bench.io.sendall(frame(1, b"out"))
    stream.send(b"in")
    assert bench.read_to_end(stream.sock) == frame(1, b"out")
    assert not bench.channel.is_in_use
    assert set(bench.owner.causes) == {"I/O channel: Broken pipe"}


def test_vm_that_takes_no_more_and_whose_client_is_slow_delivers_all(make_bench: BenchMaker) -> None:
    """The channel finds out by sending while it must not read."""
    bench = make_bench(5 * BLOCK)
    slow, typist = bench.open(buffer=SMALL), bench.open()
    sent = bring_into("full", bench, slow)
    bench.io.shutdown(socket.SHUT_RD)
    typist.send(b"in")
    bench.settle()
    assert bench.owner.causes
    assert bench.read_to_end(slow.sock) == sent
    assert not bench.channel.is_in_use


def test_vm_that_did_not_read_and_hangs_up_while_a_client_is_slow_delivers_all(
    make_bench: BenchMaker,
) -> None:
    """Stdin waits for the VM, output waits for a client, and then the VM goes."""
    bench = make_bench(5 * BLOCK)
    slow, typist = bench.open(buffer=SMALL), bench.open()
    fill(bench.near_io)
    typist.send(b"in")
    bench.settle()
    assert bench.blocked()
    sent = bring_into("full", bench, slow)
    bench.io.close()
    bench.step()
    assert bench.owner.causes
    assert bench.read_to_end(slow.sock) == sent
    assert not bench.channel.is_in_use


def test_vm_that_takes_nothing_has_no_markers_to_be_waited_for(make_bench: BenchMaker) -> None:
    """Or the pump is woken up for nothing, again and again."""
    bench = make_bench(window=WINDOW)
    paced, other = bench.open(), bench.open()
    paced.send(bytes(600))
    assert bench.frames()
    fill(bench.near_io)
    other.send(b"x")
    bench.settle()
    assert bench.blocked()
    bench.pass_time(10 * ECHO_TIMEOUT)
    assert bench.is_at_rest()


@pytest.mark.parametrize("end", ENDS)
def test_both_channels_are_closed_while_the_rest_is_delivered(
    bench: Bench, end: Callable[[Bench], None]
) -> None:
    """A guest whose host has gone half spins: so it is not left to wait for a client that does not read."""
    stream = bench.open(buffer=SMALL)
    sent = bench.stall(stream)
    ctl, io = bench.ctl.dup(), bench.io.dup()
    with ctl, io:
        # What is shut down here in place of closing it can still be read.
        if end is close_io:
            bench.io.shutdown(socket.SHUT_RDWR)
        elif end is close_control:
            bench.ctl.shutdown(socket.SHUT_RDWR)
        else:
            end(bench)
        bench.settle()
        assert bench.owner.causes
        for far in (ctl, io):
            far.settimeout(WAIT)
            assert at_end(far)
            with pytest.raises(BrokenPipeError):
                far.send(b"x")
    assert bench.channel.is_in_use
    assert bench.read_to_end(stream.sock) == sent
    assert not bench.channel.is_in_use


def test_unfinished_frame_at_the_end_is_dropped(bench: Bench) -> None:
    stream = bench.open()
    bench.io.sendall(frame(1, b"whole") + frame(1, b"half")[:-1])
    bench.io.close()
    assert bench.read_to_end(stream.sock) == frame(1, b"whole")


def test_client_that_goes_while_the_rest_is_delivered_ends_the_channel(
    tight_bench: Bench, state: str
) -> None:
    bench = tight_bench
    stream = bench.open(buffer=SMALL)
    bring_into(state, bench, stream)
    bench.io.close()
    stream.close()
    bench.settle()
    assert not bench.channel.is_in_use


# Its own end ----------------------------------------------------------------------------------------------


def test_finish_waits_for_its_moment_and_the_earliest_counts(bench: Bench) -> None:
    stream = bench.open()
    bench.finish(100)
    bench.finish(10)
    bench.finish(1_000)
    bench.pass_time(9)
    bench.say(frame(1, b"goes on"))
    assert stream.read_frame().payload == b"goes on"
    stream.send(b"goes on")
    assert bench.frames() == [(1, b"goes on")]
    bench.pass_time(1)
    assert bench.at_end(stream.sock)
    assert at_end(bench.io)
    assert not bench.channel.is_in_use
    assert bench.owner.causes == ["the test ends"]


def test_moment_to_finish_ends_a_wait(bench: Bench, clock: Clock) -> None:
    bench.finish(0.001)
    assert bench.channel.wait() == []
    clock.now += 0.001
    bench.channel.serve([])
    assert not bench.channel.is_in_use


def test_vm_that_hangs_up_does_not_wait_for_that_moment(bench: Bench) -> None:
    bench.finish(NEVER)
    bench.io.close()
    bench.step()
    assert not bench.channel.is_in_use


def test_channel_without_sessions_is_in_use_as_long_as_its_vm(bench: Bench) -> None:
    bench.open().close()
    bench.step()
    assert not bench.streams().sessions
    assert bench.channel.is_in_use
    bench.io.close()
    bench.step()
    assert not bench.channel.is_in_use


def test_abort_waits_for_nothing(tight_bench: Bench, state: str, tmp_path: Path) -> None:
    bench = tight_bench
    stream = bench.open(buffer=SMALL)
    sent = bring_into(state, bench, stream)
    bench.channel.abort()
    assert not bench.channel.is_in_use
    assert at_end(bench.ctl)
    assert sent.startswith(bench.read_to_end(stream.sock))
    assert (bench.space.used, spool_files(tmp_path)) == (0, 0)
    bench.channel.abort()
    bench.finish()
    bench.turn()
    assert not bench.channel.is_in_use


def test_rest_is_delivered_when_reading_is_finished(tight_bench: Bench, state: str) -> None:
    bench = tight_bench
    stream = bench.open(buffer=SMALL)
    sent = bring_into(state, bench, stream)
    bench.channel.finish_reading()
    bench.channel.finish_reading()
    assert bench.read_to_end(stream.sock) == sent
    assert not bench.channel.is_in_use
    assert bench.owner.causes == []


def test_session_that_ends_in_the_turn_in_which_its_client_reads_is_no_matter(bench: Bench) -> None:
    stream, other = bench.open(buffer=SMALL), bench.open(buffer=SMALL)
    bench.stall(stream)
    bench.stall(other)
    read_now(stream.sock)
    bench.mailbox.post(bench.channel.abort)
    read_now(other.sock)
    bench.step()
    assert not bench.channel.is_in_use
    bench.read_to_end(stream.sock)
    bench.read_to_end(other.sock)
    assert bench.owner.causes == []


def test_session_that_comes_while_the_rest_is_delivered_sees_the_end_at_once(bench: Bench) -> None:
    bench.stall(bench.open(buffer=SMALL))
    bench.io.close()
    bench.step()
    late = bench.open()
    assert at_end(late.sock)
    assert bench.channel.is_in_use


def test_everything_is_closed_at_the_end(make_bench: BenchMaker) -> None:
    before = open_fds()
    near, far = pair()
    bench = make_bench(console=Console("vm", near))
    streams = [bench.open() for _ in range(3)]
    bench.turn()
    bench.end()
    assert all(at_end(stream.sock) for stream in streams)
    ours = {bench.io.fileno(), bench.ctl.fileno(), far.fileno()} | {
        stream.sock.fileno() for stream in streams
    }
    assert set(open_fds()) - set(before) == ours
    far.close()


# Stdin ----------------------------------------------------------------------------------------------------


def test_vm_that_does_not_read_stops_nothing_else_and_loses_nothing(make_bench: BenchMaker) -> None:
    bench = make_bench(io_buffer=SMALL)
    streams = [bench.open() for _ in range(3)]
    data = {stream.base: random.Random(stream.base).randbytes(60_000) for stream in streams}
    for stream in streams:
        payload = data[stream.base]
        stream.sock.sendall(
            b"".join(frame(stream.base, payload[at:][:3_000]) for at in range(0, 60_000, 3_000))
        )
        stream.sock.shutdown(socket.SHUT_WR)
    for number in range(10):
        bench.settle()
        assert bench.blocked()
        for stream in streams:
            bench.say(frame(stream.base, b"%d" % number))
            assert stream.read_frame().payload == b"%d" % number
    taken = dict.fromkeys(data, b"")
    ended: set[int] = set()
    while len(ended) < 3:
        seq, length = FRAME.unpack(bench.read(bench.io, FRAME.size))
        payload = bench.read(bench.io, length - FRAME.size)
        taken[seq] += payload
        if not payload:
            ended.add(seq)
    assert taken == data
    assert not bench.blocked()


def test_how_long_the_vm_has_taken_nothing_is_told(make_bench: BenchMaker) -> None:
    bench = make_bench()
    stream = bench.open()
    filled = fill(bench.near_io)
    stream.send(b"held")
    bench.settle()
    bench.pass_time(5)
    assert (bench.streams().stdin_held, bench.streams().stdin_stalled) == (16, 5.0)
    assert len(bench.read(bench.io, filled)) == filled
    assert (bench.streams().stdin_held, bench.streams().stdin_stalled) == (0, 0.0)
    assert bench.frames() == [(stream.base, b"held")]


def test_clients_that_go_while_the_vm_takes_nothing_are_given_up(bench: Bench) -> None:
    """But for those who have sent something: that is still the VM's to take."""
    busy, *silent, late = [bench.open(1) for _ in range(4)]
    filled = fill(bench.near_io)
    busy.send(bytes(1_000))
    bench.settle()
    assert bench.blocked()
    late.send(b"the last word")
    for stream in (*silent, late):
        stream.close()
    bench.settle()
    assert bench.streams().sessions == 4
    bench.pass_time(1)
    assert bench.streams().sessions == 2, "the silent ones are gone"
    bench.read(bench.io, filled)
    assert bench.frames() == [(busy.base, bytes(1_000)), (late.base, b"the last word"), (late.base, b"")]
    assert bench.streams().sessions == 1


def test_end_of_file_is_sent_once_though_its_client_goes_while_the_vm_takes_nothing(bench: Bench) -> None:
    stream, busy = bench.open(), bench.open()
    stream.send(b"all")
    stream.sock.shutdown(socket.SHUT_WR)
    assert bench.frames() == [(stream.base, b"all"), (stream.base, b"")]
    filled = fill(bench.near_io)
    busy.send(b"held")
    bench.settle()
    stream.close()
    bench.pass_time(1)
    assert bench.streams().sessions == 1
    bench.read(bench.io, filled)
    assert bench.frames() == [(busy.base, b"held")]


@pytest.mark.parametrize("half_closed", [False, True])
def test_clients_that_go_while_nothing_flows_in_either_direction_are_given_up(
    make_bench: BenchMaker, half_closed: bool
) -> None:
    """The VM takes nothing, and is not read because of another client."""
    bench = make_bench(0, io_buffer=SMALL)
    slow, busy, goes = bench.open(buffer=SMALL), bench.open(), bench.open()
    if half_closed:
        goes.send(b"all")
        goes.sock.shutdown(socket.SHUT_WR)
        assert bench.frames() == [(goes.base, b"all"), (goes.base, b"")]
    filled = fill(bench.near_io)
    busy.send(b"held")
    bench.say(numbered(slow.base, 50))
    bench.pass_time(A_MOMENT)
    assert bench.paused()
    assert bench.blocked()
    goes.close()
    for _ in range(3):
        bench.pass_time(1)
    assert bench.streams().sessions == 2
    bench.read(bench.io, filled)
    assert bench.frames() == [(busy.base, b"held")], "and no second end of file"


def test_stdin_is_paced_and_goes_on_with_each_echo(pacing: Bench) -> None:
    bench = pacing
    stream = bench.open()
    data = random.Random(1).randbytes(5_000)
    stream.send(data)
    stream.send()
    taken = b""
    frames: list[Frame] = []
    while Frame(stream.base, b"") not in frames:
        *frames, marker = bench.frames()
        assert marker.seq >= MARKER
        assert bench.streams().stdin_unacknowledged == 1
        payload = b"".join(payload for _, payload in frames)
        assert 0 < len(payload) <= WINDOW
        taken += payload
        bench.say(frame(marker.seq))
    assert frames[-1] == (stream.base, b"")
    assert taken == data
    assert bench.streams().stdin_unacknowledged == 0
    assert bench.streams().traffic.stray_frames == 0


def test_markers_are_asked_for_again_on_time_and_never_for_who_has_gone(pacing: Bench) -> None:
    bench = pacing
    stream = bench.open()
    stream.send(bytes(WINDOW))
    *_, marker = bench.frames()
    for _ in range(3):
        bench.pass_time(ECHO_TIMEOUT - 1)
        assert bench.frames() == []
        bench.pass_time(1)
        assert bench.frames() == [marker]
    stream.sock.sendall(frame(99))
    bench.say(frame(marker.seq))
    assert not bench.streams().sessions
    bench.frames()
    bench.pass_time(ECHO_TIMEOUT)
    assert bench.frames() == []
    assert bench.is_at_rest()


def test_vm_that_has_hung_up_is_asked_for_nothing_more(pacing: Bench) -> None:
    """Whatever it had yet to acknowledge, and for however long a slow client reads on."""
    bench = pacing
    slow, paced = bench.open(buffer=SMALL), bench.open()
    sent = bench.stall(slow)
    paced.send(bytes(WINDOW))
    bench.settle()
    bench.pass_time(ECHO_TIMEOUT)  # its VM has yet to take the marker
    close_io(bench)
    bench.settle()
    bench.pass_time(ECHO_TIMEOUT)
    assert bench.is_at_rest()
    assert bench.read_to_end(slow.sock) == sent


def test_marker_that_is_due_ends_a_wait(pacing: Bench, clock: Clock) -> None:
    bench = pacing
    bench.open().send(bytes(WINDOW))
    *_, marker = bench.frames()
    clock.now += ECHO_TIMEOUT - 0.001
    assert bench.channel.wait() == []
    clock.now += 0.001
    bench.channel.serve([])
    assert frames_of(read_now(bench.io)) == [marker]


def test_markers_that_cannot_have_come_back_are_not_asked_for_again(pacing: Bench, clock: Clock) -> None:
    """The VM is not read, because of a slow client."""
    bench = pacing
    slow, typist = bench.open(buffer=SMALL), bench.open()
    sent = numbered(slow.base, 30)
    bench.say(sent)
    bench.pass_time(A_MOMENT)
    assert bench.paused()
    typist.send(bytes(400))
    data, marker = bench.frames()
    assert data == (typist.base, bytes(400))
    for _ in range(5):
        bench.pass_time(ECHO_TIMEOUT)
        assert bench.frames() == []
    assert bench.read(slow.sock, len(sent)) == sent
    assert bench.frames() == [], "its time begins anew"
    bench.pass_time(ECHO_TIMEOUT)
    assert bench.frames() == [marker]


def test_agent_that_never_echoes(make_bench: BenchMaker) -> None:
    bench = make_bench(window=WINDOW)
    stream = bench.open()
    data = random.Random(2).randbytes(10_000)
    stream.send(data)
    taken = b""
    for _ in range(100):
        taken += b"".join(payload for _, payload in bench.frames())
        if len(taken) == len(data):
            break
        bench.pass_time(ECHO_TIMEOUT / 2)
        while bench.rounds:
            bench.rounds.pop()(True)
    assert taken == data


# Waiting costs nothing ------------------------------------------------------------------------------------


def idle_client(bench: Bench) -> None:
    bench.open()


def vm_that_reads_nothing_with_a_marker_due(bench: Bench) -> None:
    stream = bench.open()
    stream.send(bytes(600))
    bench.settle()
    assert bench.streams().stdin_unacknowledged
    fill(bench.near_io)
    for _ in range(8):  # it is looked for less and less often
        bench.pass_time(ECHO_TIMEOUT)
    assert not bench.blocked(), "it is asked for again in vain"


def vm_that_reads_nothing_while_clients_send(bench: Bench) -> None:
    streams = [bench.open() for _ in range(3)]
    fill(bench.near_io)
    streams[0].send(b"x")
    bench.settle()
    assert bench.blocked()
    streams[1].send(b"x")
    streams[2].close()


def lost_control_channel_behind_a_client_that_reads_nothing(bench: Bench) -> None:
    bench.stall(bench.open(buffer=SMALL))
    bench.ctl.close()
    bench.step()
    assert bench.owner.causes


def client_that_reads_nothing(bench: Bench) -> None:
    bench.stall(bench.open(buffer=SMALL))


def client_that_is_waited_for(bench: Bench) -> None:
    stream = bench.open(buffer=SMALL)
    bench.say(numbered(stream.base, 10))
    assert bench.paused()


def full_spool(bench: Bench) -> None:
    stream = bench.open(buffer=SMALL)
    bench.say(numbered(stream.base, 50))
    bench.pass_time(A_MOMENT)
    bench.say(numbered(stream.base, 1))
    assert bench.paused()


def vm_that_reads_nothing_behind_a_full_spool(bench: Bench) -> None:
    full_spool(bench)
    fill(bench.near_io)
    bench.open().send(b"x")
    bench.settle()
    assert bench.blocked()
    bench.pass_time(ECHO_TIMEOUT)


def vm_that_hung_up_behind_a_full_spool(bench: Bench) -> None:
    full_spool(bench)
    bench.io.close()
    bench.step()
    assert bench.owner.causes


def vm_that_takes_no_more_behind_a_full_spool(bench: Bench) -> None:
    full_spool(bench)
    bench.io.shutdown(socket.SHUT_RD)
    bench.open().send(b"x")
    bench.step()
    assert bench.owner.causes


def client_that_hung_up_while_its_marker_is_on_its_way(bench: Bench) -> None:
    stream = bench.open()
    stream.send(bytes(5_000))
    bench.settle()
    assert bench.streams().stdin_unacknowledged
    stream.close()


def client_that_half_closed(bench: Bench) -> None:
    bench.open().sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    "wait_for",
    [
        idle_client,
        vm_that_reads_nothing_with_a_marker_due,
        vm_that_reads_nothing_while_clients_send,
        client_that_reads_nothing,
        client_that_is_waited_for,
        lost_control_channel_behind_a_client_that_reads_nothing,
        full_spool,
        vm_that_reads_nothing_behind_a_full_spool,
        vm_that_hung_up_behind_a_full_spool,
        vm_that_takes_no_more_behind_a_full_spool,
        client_that_hung_up_while_its_marker_is_on_its_way,
        client_that_half_closed,
    ],
)
def test_waiting_for_it_takes_no_turns(pacing: Bench, wait_for: Callable[[Bench], None]) -> None:
    wait_for(pacing)
    pacing.settle()
    assert pacing.is_at_rest()


def test_control_channel_that_is_in_use_takes_no_turns(bench: Bench) -> None:
    def ask() -> None:
        with suppress(ControlLost):
            bench.control.transact(Asked(Code.PING), b"", NEVER)

    with in_background(ask):
        read_exact(bench.ctl, 8)
        bench.ctl.sendall(command(ASYNC_EVENT))
        bench.settle()
        at_rest = bench.is_at_rest()
        bench.ctl.close()
    assert at_rest


# The console ----------------------------------------------------------------------------------------------


def test_console_is_logged_until_it_ends_and_the_channel_goes_on(
    make_bench: BenchMaker, logged: Logged
) -> None:
    logger.setLevel(CONSOLE)
    near, far = pair()
    with far:
        bench = make_bench(console=Console("vm", near))
        far.sendall(b"booting\nlog")
        bench.step()
        far.sendall(b"in: \n# ")
        bench.step()
        far.close()
        bench.step()
    assert [fields["line"] for fields in logged.fields("console")] == ["booting", "login: ", "# "]
    assert near.fileno() == -1, "it is closed"
    # Its fd is the next session's, which is watched like any other.
    stream = bench.open(buffer=SMALL)
    sent = bench.stall(stream)
    assert bench.read(stream.sock, len(sent)) == sent


# What is about to come ------------------------------------------------------------------------------------


def test_next_frame_is_looked_for_before_the_thread_sleeps_unless_the_vm_takes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Spin] = []

    def wait(spin: Spin, look: Callable[[], T | None], sleep: Callable[[], T]) -> T:
        waits.append(spin)
        return look() or sleep()

    monkeypatch.setattr(Spin, "wait", wait)
    stream = bench.open()
    for number in range(1, 5):
        stream.send(b"question")
        bench.step()
        assert read_frames(bench.io, 1) == [(stream.base, b"question")]
        bench.io.sendall(frame(stream.base, b"answer"))
        bench.step()
        assert stream.read_frame().payload == b"answer"
        assert len(waits) == 2 * number
    fill(bench.near_io)
    stream.send(b"held")
    bench.step()
    assert bench.blocked()
    waits.clear()
    bench.say(frame(stream.base, b"more"))
    assert waits == []
