"""A pump as a thread between socket pairs: every state a client, a VM or its own end can be in."""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from cc_proxy.api.status import Streams
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.proxy.spin import Eager
from cc_proxy.proxy.streams import session as session_module
from cc_proxy.proxy.streams import stdin as stdin_module
from cc_proxy.proxy.streams.output import Output
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.streams.stats import describe_streams
from cc_proxy.proxy.streams.stdin import Stdin
from cc_proxy.proxy.users import Share
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink
from tests.proxy.conftest import Logged
from tests.proxy.support import (
    NEVER,
    Rig,
    close_once,
    fill,
    frames_of,
    open_fds,
    pair,
    read_frames,
    read_now,
    read_to_end,
    spool_files,
    spool_space,
)
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
    wait_until,
)

T = TypeVar("T")

SMALL = 4_608

HUNG_UP = "the VM hung up its I/O channel"
PAUSED = "the VM is not read until its client reads"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are not waited for: what they do not take is spooled at once."""
    monkeypatch.setattr(session_module, "_PATIENCE", 0.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are waited for as long as they like: nothing is spooled."""
    monkeypatch.setattr(session_module, "_PATIENCE", NEVER)


def numbered(seq: int, count: int, size: int = 2_000) -> bytes:
    """Frames that can be told from each other."""
    return b"".join(frame(seq, (b"%d " % number * size)[:size]) for number in range(count))


def stall(rig: Rig, stream: Stream) -> bytes:
    """Output on a stream until its client takes no more; returns it."""
    session = rig.call(lambda: rig.pump._owners[stream.base])
    sent = b""
    while not rig.call(lambda: session.waits):
        more = numbered(stream.base, 5)
        rig.io.sendall(more)
        sent += more
        rig.settle()
    return sent


def spooled(pump: Pump, stream: Stream) -> bool:
    return pump._owners[stream.base].spooled > 0


def paused(pump: Pump) -> bool:
    return pump._output.paused


def blocked(pump: Pump) -> bool:
    return pump._stdin.blocked


# Delivery -------------------------------------------------------------------------------------------------


def test_frames_go_both_ways(rig: Rig) -> None:
    one, other = rig.open(), rig.open()
    rig.io.sendall(frame(one.base, b"out") + frame(other.base + 1, b"err") + frame(99, b"nobody's"))
    assert one.read_frame() == (1, b"out")
    assert other.read_frame() == (4, b"err")
    other.send(b"in")
    assert read_frames(rig.io, 1) == [(3, b"in")]
    rig.settle()
    counters = rig.pump.counters
    assert (counters.bytes_to_clients, counters.bytes_to_vm) == (3 * 12 + 14, 14)
    assert (counters.stray_frames, counters.pauses) == (1, 0)


def test_session_is_known_to_the_pump_before_what_the_vm_sends_for_it_is_read(rig: Rig) -> None:
    """Whoever learns its seq may have the VM send at once."""
    for _ in range(300):
        session, stream = rig.session()
        rig.io.sendall(b"")
        assert rig.pump.add(session)
        rig.io.sendall(frame(stream.base, b"at once"))
        assert stream.read_frame() == (stream.base, b"at once")
        stream.close()


class SlowToRead:
    """The I/O channel as the pump reads it, with something that happens just before it does."""

    def __init__(self, sock: socket.socket, happens: Callable[[], None]) -> None:
        self._sock = sock
        self._happens: Callable[[], None] | None = happens

    def recv_into(self, view: memoryview) -> int:
        happens, self._happens = self._happens, None
        if happens:
            happens()
        return self._sock.recv_into(view)


def test_session_that_comes_while_the_vm_is_about_to_be_read_gets_its_frames(rig: Rig) -> None:
    first = rig.open()
    session, second = rig.session()

    def be_quick() -> None:
        assert rig.pump.add(session)
        rig.io.sendall(frame(second.base, b"at once"))

    slow = SlowToRead(rig.pump._io, be_quick)
    rig.call(lambda: setattr(rig.pump._output, "_io", slow))
    rig.io.sendall(frame(first.base, b"first"))
    assert first.read_frame().payload == b"first"
    rig.settle()
    assert rig.call(lambda: rig.pump.counters.stray_frames) == 0
    assert second.read_frame().payload == b"at once"


def test_markers_that_nobody_waits_for_and_frames_that_nobody_owns_are_told_apart(rig: Rig) -> None:
    rig.io.sendall(frame(7) + frame(MARKER + 1) + frame(MARKER - 1) + frame(2**64 - 1))
    rig.settle()
    assert rig.call(lambda: rig.pump.counters.stray_frames) == 2


# Slow clients ---------------------------------------------------------------------------------------------


def test_stalled_client_among_live_ones(rig: Rig, impatient: None, tmp_path: Path) -> None:
    stalled, *live = (rig.open(buffer=SMALL) for _ in range(4))
    sent = stall(rig, stalled)
    for number in range(50):
        data = b"%d" % number
        more = frame(stalled.base, data * 700)
        rig.io.sendall(more + b"".join(frame(stream.base, data) for stream in live))
        sent += more
        for stream in live:
            assert stream.read_frame() == (stream.base, data)
            stream.send(data)
        assert sorted(read_frames(rig.io, 3)) == sorted(Frame(stream.base, data) for stream in live)
    assert spool_files(tmp_path) == 1
    assert read_exact(stalled.sock, len(sent)) == sent
    rig.wait(lambda pump: not pump._output.waiting, "nothing waits")
    assert spool_files(tmp_path) == 0
    rig.io.sendall(frame(stalled.base, b"direct again"))
    assert stalled.read_frame() == (stalled.base, b"direct again")
    assert rig.call(lambda: rig.space.used) == 0


def test_patience_ends_without_anything_happening(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_PATIENCE", 0.05)
    stalled, live = rig.open(buffer=SMALL), rig.open()
    rig.io.sendall(numbered(stalled.base, 20))
    rig.wait(lambda pump: pump._owners[stalled.base].spooled > 0, "its output is spooled")
    rig.io.sendall(frame(live.base, b"out"))
    assert live.read_frame() == (live.base, b"out")


def test_spool_full_pauses_the_vm_and_resumes(impatient: None, tmp_path: Path, logged: Logged) -> None:
    with Rig(spool_space(tmp_path, session_limit=50_000)) as rig:
        stalled, live = rig.open(buffer=SMALL), rig.open()
        sent = numbered(stalled.base, 200) + frame(live.base, b"behind")
        with in_background(lambda: rig.io.sendall(sent)):
            rig.wait(paused, "the VM waits")
            assert rig.pump.counters.pauses == 1
            live.send(b"in")  # the other direction flows
            assert read_frames(rig.io, 1) == [(live.base, b"in")]
            rig.ctl.sendall(command(ASYNC_EVENT, b"{}"))  # and so does the control channel
            wait_until(lambda: any(event.code == ASYNC_EVENT for event in rig.events), "the event")
            assert is_silent(live.sock)
            assert rig.call(lambda: paused(rig.pump))
            size = len(sent) - 18
            assert read_exact(stalled.sock, size) == sent[:size]
        assert live.read_frame() == (live.base, b"behind")
        assert set(logged.at(logging.WARNING)) == {PAUSED}
        assert rig.call(lambda: rig.space.used) == 0


def test_total_limit_is_shared_by_the_vms(impatient: None, tmp_path: Path) -> None:
    space = spool_space(tmp_path, total_limit=60_000)
    with Rig(space) as rig, Rig(space) as other:
        greedy, modest = rig.open(buffer=SMALL), other.open(buffer=SMALL)
        sent = numbered(1, 200)
        with in_background(lambda: rig.io.sendall(sent)):
            rig.wait(paused, "the first has taken it all")
            assert space.used == 60_000
            more = stall(other, modest)
            other.wait(paused, "nothing is left for the second")
            assert space.used <= 60_000
            assert read_exact(modest.sock, len(more)) == more
            other.wait(lambda pump: not paused(pump), "its client has read")
            assert read_exact(greedy.sock, len(sent)) == sent
        wait_until(lambda: space.used == 0, "all is given back")


def test_missing_spool_directory_is_logged_once_and_loses_nothing(
    impatient: None, tmp_path: Path, logged: Logged
) -> None:
    with Rig(spool_space(tmp_path / "missing")) as rig:
        stalled = rig.open(buffer=SMALL)
        sent = numbered(1, 300)
        with in_background(lambda: rig.io.sendall(sent)):
            rig.wait(paused, "the VM waits")
            stalled.send(b"in")
            assert read_frames(rig.io, 1) == [(1, b"in")]
            assert logged.at(logging.WARNING) == [PAUSED]
            assert read_exact(stalled.sock, len(sent)) == sent
        rig.wait(lambda pump: not paused(pump), "the VM is read again")
        assert rig.pump.counters.pauses >= 1


class Traffic:
    """An agent, and clients that read at their own speed, a thread each; every byte is checked."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self._rig = rig
        self._rng = rng
        self._streams = [rig.open(buffer=SMALL if number % 2 else None) for number in range(4)]
        self._down = {stream.base: rng.randbytes(250_000) for stream in self._streams}
        self._up = {stream.base: rng.randbytes(20_000) for stream in self._streams}
        self._writing = threading.Lock()  # guards what the VM sends: whole frames

    def work(self) -> list[Callable[[], None]]:
        seeds = [self._rng.random() for _ in self._streams]
        return [
            self._send_down,
            self._take_up,
            *(
                partial(work, stream, random.Random(seed))
                for stream, seed in zip(self._streams, seeds, strict=True)
                for work in (self._read, self._send)
            ),
        ]

    def _say(self, data: bytes) -> None:
        with self._writing:
            self._rig.io.sendall(data)

    def _send_down(self) -> None:
        left = dict(self._down)
        while left:
            seq = self._rng.choice(list(left))
            size = self._rng.randrange(1, 8_000)
            self._say(frame(seq, left[seq][:size]))
            left[seq] = left[seq][size:]
            if not left[seq]:
                del left[seq]

    def _take_up(self) -> None:
        taken = dict.fromkeys(self._up, b"")
        while taken != self._up:
            ((seq, payload),) = read_frames(self._rig.io, 1)
            if seq >= MARKER:
                self._say(frame(seq))
            else:
                taken[seq] += payload
                assert self._up[seq].startswith(taken[seq])

    def _read(self, stream: Stream, rng: random.Random) -> None:
        rests = threading.Event()
        data, payload = bytearray(), bytearray()
        while len(payload) < len(self._down[stream.base]):
            data += stream.sock.recv(rng.choice([50, 2_000, 60_000]))
            if rng.random() < 0.05:
                rests.wait(rng.random() * 0.01)
            while len(data) >= FRAME.size and len(data) >= (length := FRAME.unpack_from(data)[1]):
                payload += data[FRAME.size : length]
                del data[:length]
        assert payload == self._down[stream.base]

    def _send(self, stream: Stream, rng: random.Random) -> None:
        left = self._up[stream.base]
        while left:
            size = rng.randrange(1, 9_000)
            stream.send(left[:size])
            left = left[size:]


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_at_any_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Both directions, two VMs that share the spool, which is often full."""
    monkeypatch.setattr(session_module, "_PATIENCE", [0.0, 0.001, 0.02][seed % 3])
    space = spool_space(tmp_path, session_limit=[200_000, 30_000, 0][seed % 3], total_limit=300_000)
    with ExitStack() as stack:
        rigs = [stack.enter_context(Rig(space, window=[0, 512][seed % 2])) for _ in range(2)]
        for number, rig in enumerate(rigs):
            for work in Traffic(rig, random.Random(seed * 2 + number)).work():
                stack.enter_context(in_background(work))
    assert space.used == 0
    assert spool_files(tmp_path) == 0


# Clients that go ------------------------------------------------------------------------------------------

STATES = ["direct", "pending", "spooled", "full"]


def bring_into(state: str, rig: Rig, stream: Stream) -> bytes:
    """Output on a stream until its session is in this state; returns all of it."""
    if state == "direct":
        sent = numbered(stream.base, 3)
        rig.io.sendall(sent)
        rig.settle()
        return sent
    sent = numbered(stream.base, 50)
    # The pump has read a part of a frame, and the rest of it may be in the socket.
    rig.io.sendall(sent[:60_007])
    if state == "spooled":
        rig.io.sendall(sent[60_007:])
        rig.wait(lambda pump: spooled(pump, stream) and not paused(pump), "all is spooled")
        return sent
    rig.wait(paused, "the VM waits")
    assert rig.call(lambda: rig.pump._owners[stream.base].spooled) == (20_000 if state == "full" else 0)
    assert unread_by_peer(rig.io) == 0
    rig.io.sendall(sent[60_007:])
    assert unread_by_peer(rig.io)
    return sent


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a session is in when something happens."""
    chosen = str(request.param)
    monkeypatch.setattr(session_module, "_PATIENCE", NEVER if chosen == "pending" else 0.0)
    return chosen


@pytest.fixture
def small_rig(state: str, tmp_path: Path) -> Iterator[Rig]:
    """Whose spool is as small as that state needs."""
    with Rig(spool_space(tmp_path, session_limit=20_000 if state == "full" else 1_000_000)) as rig:
        yield rig


@pytest.mark.parametrize("stdin", [b"", b"typed"])
@pytest.mark.parametrize("how", ["closed", "broke the protocol"])
def test_client_that_goes_leaves_the_others_alone(
    small_rig: Rig, state: str, how: str, stdin: bytes, tmp_path: Path
) -> None:
    rig = small_rig
    leaver, other = rig.open(buffer=SMALL), rig.open()
    bring_into(state, rig, leaver)
    if stdin:
        leaver.send(stdin)
    if how == "closed":
        leaver.close()
    else:
        leaver.sock.sendall(frame(other.base, b"not mine"))
    rig.wait(lambda pump: len(pump._sessions) == 1, "the session is closed")
    rig.io.sendall(frame(other.base, b"out") + numbered(leaver.base, 50) + frame(other.base, b"more"))
    assert [other.read_frame(), other.read_frame()] == [(other.base, b"out"), (other.base, b"more")]
    other.send(b"in")
    expected = [Frame(leaver.base, stdin)] * bool(stdin)
    expected += [Frame(leaver.base, b"")] * bool(stdin and how == "closed")
    assert read_frames(rig.io, len(expected) + 1) == [*expected, Frame(other.base, b"in")]
    assert (rig.space.used, spool_files(tmp_path)) == (0, 0)
    assert rig.call(lambda: not paused(rig.pump) and not rig.pump._output.waiting)
    assert rig.owner.causes == []


@pytest.mark.parametrize("state", ["direct", "spooled"], indirect=True)
def test_client_that_takes_no_more_may_still_send(small_rig: Rig, state: str) -> None:
    rig = small_rig
    stream, other = rig.open(buffer=SMALL), rig.open()
    bring_into(state, rig, stream)
    stream.sock.shutdown(socket.SHUT_RD)
    rig.io.sendall(frame(stream.base, b"to nobody") + frame(other.base, b"out"))
    assert other.read_frame() == (other.base, b"out")
    stream.send(b"in")
    assert read_frames(rig.io, 1) == [(stream.base, b"in")]
    stream.sock.shutdown(socket.SHUT_WR)
    assert read_frames(rig.io, 1) == [(stream.base, b"")]
    rig.wait(lambda pump: len(pump._sessions) == 1, "the session is closed")


def test_half_closed_client_gets_its_output(small_rig: Rig, state: str) -> None:
    rig = small_rig
    stream = rig.open(buffer=SMALL)
    sent = bring_into(state, rig, stream)
    stream.send(b"last")
    stream.sock.shutdown(socket.SHUT_WR)
    assert read_frames(rig.io, 2) == [(stream.base, b"last"), (stream.base, b"")]
    sent += frame(stream.base) + frame(stream.base, b"\7")
    rig.io.sendall(sent[-25:])
    assert read_exact(stream.sock, len(sent)) == sent
    stream.close()
    rig.wait(lambda pump: not pump._sessions, "the session is closed")


# A VM that goes -------------------------------------------------------------------------------------------


def close_io(rig: Rig) -> None:
    rig.io.close()


def send_no_more(rig: Rig) -> None:
    rig.io.shutdown(socket.SHUT_WR)


def lose_framing(rig: Rig) -> None:
    rig.io.sendall(frame(1, length=5))


def close_control(rig: Rig) -> None:
    rig.ctl.close()


def talk_nonsense(rig: Rig) -> None:
    rig.ctl.sendall(command(9, length=3))


def finish(rig: Rig) -> None:
    rig.pump.finish("the test ends")


ENDS = [close_io, send_no_more, lose_framing, close_control, talk_nonsense, finish]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stdin", ["none", "before", "after"])
def test_clients_get_all_that_was_sent_and_then_its_end(
    small_rig: Rig, state: str, end: Callable[[Rig], None], stdin: str, tmp_path: Path
) -> None:
    """Whatever was waiting for them, however the VM goes, and though they send something meanwhile."""
    rig = small_rig
    stream, idle, typist = rig.open(buffer=SMALL), rig.open(), rig.open()
    sent = bring_into(state, rig, stream)
    if stdin == "before":
        typist.send(b"typed")
        rig.wait(lambda pump: pump.counters.bytes_to_vm > 0, "it is on its way to the VM")
    end(rig)
    if stdin == "after":
        for _ in range(3):
            rig.wait_for_turn()
            with suppress(OSError):
                typist.send(b"typed")
    assert read_to_end(stream.sock) == sent
    assert at_end(idle.sock)
    assert at_end(typist.sock)
    rig.wait_ended()
    assert rig.owner.causes
    assert (rig.space.used, spool_files(tmp_path)) == (0, 0)
    assert not rig.pump.add(rig_session(rig))


def rig_session(rig: Rig) -> Session:
    """A session that is closed by whoever refuses it."""
    session, _ = rig.session()
    session.close()
    return session


@pytest.mark.parametrize(
    ("end", "causes"),
    [
        (close_io, {HUNG_UP}),
        (send_no_more, {HUNG_UP}),
        (lose_framing, {"I/O channel: a frame on stream 1 with a total length of 5"}),
        (close_control, {"the VM hung up its control channel"}),
        (talk_nonsense, {"control channel: ack with a total length of 3"}),
    ],
)
def test_the_cause_is_told(rig: Rig, end: Callable[[Rig], None], causes: set[str]) -> None:
    stream = rig.open()
    end(rig)
    assert at_end(stream.sock)
    rig.wait_ended()
    assert set(rig.owner.causes) == causes


def test_vm_that_takes_no_more_is_lost_when_something_is_sent(rig: Rig) -> None:
    stream = rig.open()
    rig.io.shutdown(socket.SHUT_RD)
    rig.io.sendall(frame(1, b"out"))
    stream.send(b"in")
    assert read_to_end(stream.sock) == frame(1, b"out")
    rig.wait_ended()
    assert set(rig.owner.causes) == {"I/O channel: Broken pipe"}


def test_vm_that_takes_no_more_and_whose_client_is_slow_delivers_all(tmp_path: Path, impatient: None) -> None:
    """The pump finds out by sending while it must not read."""
    with Rig(spool_space(tmp_path, session_limit=20_000)) as rig:
        slow, typist = rig.open(buffer=SMALL), rig.open()
        sent = bring_into("full", rig, slow)
        rig.io.shutdown(socket.SHUT_RD)
        typist.send(b"in")
        wait_until(lambda: bool(rig.owner.causes), "it is noticed")
        assert read_to_end(slow.sock) == sent
        rig.wait_ended()


def test_vm_that_did_not_read_and_hangs_up_while_a_client_is_slow_delivers_all(
    tmp_path: Path, impatient: None
) -> None:
    """Stdin waits for the VM, output waits for a client, and then the VM goes."""
    with Rig(spool_space(tmp_path, session_limit=20_000)) as rig:
        slow, typist = rig.open(buffer=SMALL), rig.open()
        fill(rig.pump._io)
        typist.send(b"in")
        rig.wait(blocked, "the VM takes nothing")
        sent = bring_into("full", rig, slow)
        rig.io.close()
        wait_until(lambda: bool(rig.owner.causes), "it is noticed")
        assert read_to_end(slow.sock) == sent
        rig.wait_ended()


@pytest.mark.parametrize("end", [close_control, finish])
def test_vm_that_sends_without_end_ends_all_the_same(rig: Rig, end: Callable[[Rig], None]) -> None:
    stream = rig.open()
    data = numbered(1, 30)

    def send() -> None:
        with suppress(OSError):
            while True:
                rig.io.sendall(data)

    received = bytearray()
    with in_background(send):
        received += read_exact(stream.sock, len(data))
        end(rig)
        received += read_to_end(stream.sock)
    rig.wait_ended()
    assert all(payload for _, payload in frames_of(bytes(received))), "whole frames, up to the end"


@pytest.mark.parametrize("end", ENDS)
def test_both_channels_are_closed_while_the_rest_is_delivered(
    rig: Rig, impatient: None, end: Callable[[Rig], None]
) -> None:
    """A guest whose host has gone half spins: so it is not left to wait for a client that does not read."""
    stream = rig.open(buffer=SMALL)
    sent = stall(rig, stream)
    ctl, io = rig.ctl.dup(), rig.io.dup()
    with ctl, io:
        # What is shut down here in place of closing it can still be read.
        if end is close_io:
            rig.io.shutdown(socket.SHUT_RDWR)
        elif end is close_control:
            rig.ctl.shutdown(socket.SHUT_RDWR)
        else:
            end(rig)
        wait_until(lambda: bool(rig.owner.causes), "it is noticed")
        for far in (ctl, io):
            far.settimeout(WAIT)
            assert at_end(far)
            with pytest.raises(BrokenPipeError):
                far.send(b"x")
    assert not rig.owner.over.is_set()
    assert read_to_end(stream.sock) == sent


def test_unfinished_frame_at_the_end_is_dropped(rig: Rig) -> None:
    stream = rig.open()
    rig.io.sendall(frame(1, b"whole") + frame(1, b"half")[:-1])
    rig.io.close()
    assert read_to_end(stream.sock) == frame(1, b"whole")


def test_client_that_goes_while_the_rest_is_delivered_ends_the_pump(small_rig: Rig, state: str) -> None:
    rig = small_rig
    stream = rig.open(buffer=SMALL)
    bring_into(state, rig, stream)
    rig.io.close()
    stream.close()
    rig.wait_ended()


# Its own end ----------------------------------------------------------------------------------------------


def test_finish_waits_for_its_moment(rig: Rig) -> None:
    stream = rig.open()
    rig.pump.finish("over", NEVER)
    rig.io.sendall(frame(1, b"goes on"))
    assert stream.read_frame().payload == b"goes on"
    stream.send(b"goes on")
    assert read_frames(rig.io, 1) == [(1, b"goes on")]
    rig.pump.finish("over", 2 * NEVER)
    rig.pump.finish("over", 0.01)
    rig.pump.finish("over", NEVER)
    assert at_end(stream.sock)
    assert at_end(rig.io)
    rig.wait_ended()
    assert rig.owner.causes == ["over"]


def test_vm_that_hangs_up_does_not_wait_for_that_moment(rig: Rig) -> None:
    rig.pump.finish("over", NEVER)
    rig.io.close()
    rig.wait_ended()


def test_pump_without_sessions_lives_as_long_as_its_vm(rig: Rig) -> None:
    rig.open().close()
    rig.wait(lambda pump: not pump._sessions, "the session is closed")
    assert not rig.pump.join(0)
    rig.io.close()
    rig.wait_ended()


def test_abort_waits_for_nothing(small_rig: Rig, state: str, tmp_path: Path) -> None:
    rig = small_rig
    stream = rig.open(buffer=SMALL)
    sent = bring_into(state, rig, stream)
    rig.pump.abort()
    rig.wait_ended()
    assert sent.startswith(read_to_end(stream.sock))
    assert (rig.space.used, spool_files(tmp_path)) == (0, 0)
    rig.pump.abort()
    rig.pump.finish("the test ends")


def test_session_that_comes_while_the_rest_is_delivered_sees_the_end_at_once(
    rig: Rig, impatient: None
) -> None:
    slow = rig.open(buffer=SMALL)
    stall(rig, slow)
    rig.io.close()
    rig.wait(lambda pump: not pump._io_open, "the I/O channel is closed")
    late = rig.open()
    assert at_end(late.sock)
    assert not rig.owner.over.is_set()


@pytest.mark.parametrize("count", [0, 1, 3, 10, 30])
def test_sessions_that_come_as_it_ends_are_closed_or_refused(rig: Rig, count: int) -> None:
    taken: list[Stream] = []

    def add() -> None:
        while True:
            session, stream = rig.session()
            if not rig.pump.add(session):
                session.close()
                return
            taken.append(stream)

    with in_background(add):
        wait_until(lambda: len(taken) > count, "some are open")
        rig.pump.abort()
    rig.wait_ended()
    assert all(at_end(stream.sock) for stream in taken)


def test_everything_is_closed_at_the_end(space: SpoolSpace) -> None:
    before = open_fds()
    near, far = pair()
    rig = Rig(space, console=Console("vm", near))
    streams = [rig.open() for _ in range(3)]
    rig.call(lambda: None)
    rig.pump.abort()
    rig.wait_ended()
    ours = {rig.io.fileno(), rig.ctl.fileno(), far.fileno()} | {stream.sock.fileno() for stream in streams}
    assert set(open_fds()) - set(before) == ours
    rig.close()
    far.close()


def test_thread_that_cannot_be_had_leaves_nothing_open(
    space: SpoolSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Rig(space, started=False) as rig:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                rig.pump.start()
        assert at_end(rig.io)
        assert at_end(rig.ctl)
        assert not rig.pump.add(rig_session(rig))
        rig.pump.finish("the test ends")
        rig.pump.abort()


# What nobody expects --------------------------------------------------------------------------------------


def poke_output(rig: Rig, stream: Stream) -> None:
    rig.io.sendall(frame(stream.base, b"x"))


def poke_stdin(rig: Rig, stream: Stream) -> None:
    stream.send(b"x")


def poke_control(rig: Rig, stream: Stream) -> None:
    rig.ctl.sendall(command(ASYNC_EVENT))


def poke_writable(rig: Rig, stream: Stream) -> None:
    stall(rig, stream)
    stream.sock.recv(1 << 20)


def poke_mail(rig: Rig, stream: Stream) -> None:
    rig.open()


def poke_end(rig: Rig, stream: Stream) -> None:
    stream.sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("broken", "method", "poke"),
    [
        (Output, "read", poke_output),
        (Session, "deliver", poke_output),
        (Output, "flush", poke_writable),
        (Stdin, "read_clients", poke_stdin),
        (Session, "read_into", poke_stdin),
        (Stdin, "_end", poke_end),
        (Stdin, "add", poke_mail),
        (ControlLink, "read_unasked", poke_control),
        (Pump, "_watch_io", poke_output),
    ],
)
def test_error_that_nobody_expects_costs_that_vm_alone_and_leaks_nothing(  # noqa: PLR0917 - fixtures
    space: SpoolSpace,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    logged: Logged,
    broken: type,
    method: str,
    poke: Callable[[Rig, Stream], None],
    tmp_path: Path,
) -> None:
    """The leak fixture looks at what is left open."""
    with Rig(space) as rig, Rig(space) as other:
        streams = [rig.open(buffer=SMALL) for _ in range(2)]
        theirs = other.open()
        rig.wait_for_turn()  # or it would be these whose taking over fails
        pumps_thread = rig.pump._thread
        real = getattr(broken, method)

        def fail(*args: object) -> object:
            if threading.current_thread() is pumps_thread:
                raise KeyError("nobody expects it")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(broken, method, fail)
            poke(rig, streams[0])
            rig.wait_ended()
        for stream in streams:
            read_to_end(stream.sock)
        assert at_end(rig.io)
        assert rig.owner.causes == ["internal error in its I/O pump"]
        assert logged.at(logging.ERROR) == ["I/O pump failed"]
        assert (space.used, spool_files(tmp_path)) == (0, 0)
        other.io.sendall(frame(theirs.base, b"out"))
        assert theirs.read_frame().payload == b"out"


@pytest.mark.parametrize("broken", [Output, Stdin])
def test_error_in_the_middle_of_letting_a_session_go_leaks_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, broken: type[Output | Stdin]
) -> None:
    session, stream = rig.session()
    assert rig.pump.add(session)
    real = broken.forget
    calls = 0

    def fail_once(self: Output | Stdin, session: Session) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyError("nobody expects it")
        real(self, session)  # type: ignore[arg-type]  # of the class it belongs to

    monkeypatch.setattr(broken, "forget", fail_once)
    stream.sock.sendall(frame(99))
    rig.wait_ended()
    closed = session._sock.fileno() == -1
    close_once(session)
    assert closed


def test_spool_that_breaks_in_any_way_is_no_error_of_the_pump(
    rig: Rig, impatient: None, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    stream = rig.open(buffer=SMALL)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", broken)
        rig.io.sendall(numbered(1, 10))
        rig.wait(paused, "the VM waits")
        reason = "the spool cannot be used: Input/output error"
        wait_until(lambda: bool(logged.records), "it is said")
        assert logged.fields(PAUSED) == [
            {"vm": "vm", "stream": 1, "pid": 0, "uid": os.geteuid(), "reason": reason}
        ]
        assert read_exact(stream.sock, len(numbered(1, 10))) == numbered(1, 10)


# Stdin ----------------------------------------------------------------------------------------------------


def test_vm_that_does_not_read_stops_nothing_else_and_loses_nothing(space: SpoolSpace) -> None:
    with Rig(space, io_buffer=SMALL) as rig:
        streams = [rig.open() for _ in range(3)]
        data = {stream.base: random.Random(stream.base).randbytes(60_000) for stream in streams}

        def send(stream: Stream) -> None:
            payload = data[stream.base]
            stream.sock.sendall(
                b"".join(frame(stream.base, payload[at:][:3_000]) for at in range(0, 60_000, 3_000))
            )
            stream.sock.shutdown(socket.SHUT_WR)

        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(in_background(partial(send, stream)))
            for number in range(10):
                rig.wait(blocked, "the VM takes nothing")
                for stream in streams:
                    rig.io.sendall(frame(stream.base, b"%d" % number))
                    assert stream.read_frame().payload == b"%d" % number
            taken = dict.fromkeys(data, b"")
            ended: set[int] = set()
            while len(ended) < 3:
                ((seq, payload),) = read_frames(rig.io, 1)
                taken[seq] += payload
                if not payload:
                    ended.add(seq)
        assert taken == data
        rig.wait(lambda pump: not blocked(pump), "the VM takes all")


def test_clients_that_go_while_the_vm_takes_nothing_are_given_up(
    space: SpoolSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those who have sent something: that is still the VM's to take."""
    monkeypatch.setattr(stdin_module, "_LOOK_INTERVAL", 0.01)
    with Rig(space, io_buffer=SMALL) as rig:
        busy, *silent, late = [rig.open(1) for _ in range(4)]
        while not rig.call(lambda: rig.pump._stdin.blocked):
            busy.send(bytes(1_000))
        late.send(b"the last word")
        for stream in (*silent, late):
            stream.close()
        rig.wait(lambda pump: pump.session_count == 2, "the silent ones are gone")
        taken = b""
        while (item := read_frames(rig.io, 1)[0]) != (late.base, b""):
            taken += item.payload if item.seq == late.base else b""
        assert taken == b"the last word"
        rig.wait(lambda pump: pump.session_count == 1, "all but one are gone")


def test_stdin_is_paced_and_goes_on_with_each_echo(space: SpoolSpace) -> None:
    with Rig(space, window=512) as rig:
        stream = rig.open()
        data = random.Random(1).randbytes(5_000)
        stream.send(data)
        stream.send()
        taken, on_its_way = b"", 0
        while True:
            ((seq, payload),) = read_frames(rig.io, 1)
            if seq >= MARKER:
                assert is_silent(rig.io)
                on_its_way = 0
                rig.io.sendall(frame(seq))
            elif not payload:
                break
            else:
                taken += payload
                on_its_way += len(payload)
                assert on_its_way <= 512
        assert taken == data
        assert rig.call(lambda: rig.pump.counters.stray_frames) == 0


def test_markers_are_asked_for_again_on_time_and_never_for_who_has_gone(space: SpoolSpace) -> None:
    with Rig(space, window=512, echo_timeout=0.03) as rig:
        rig.call(lambda: setattr(rig.pump._stdin, "_echoed", True))
        stream = rig.open()
        stream.send(bytes(512))
        seqs: list[int] = []
        while len(seqs) < 4:
            seqs += [seq for seq, _ in read_frames(rig.io, 1) if seq >= MARKER]
        assert len(set(seqs)) == 1
        stream.sock.sendall(frame(99))
        rig.io.sendall(frame(seqs[-1]))
        rig.wait(lambda pump: not pump._sessions, "the session is closed")
        read_now(rig.io)
        assert rig.call(lambda: rig.pump._timeout() is None)


def test_markers_that_cannot_have_come_back_are_not_asked_for_again(space: SpoolSpace, patient: None) -> None:
    """The VM is not read, because of a slow client."""
    with Rig(space, window=512, echo_timeout=0.02) as rig:
        rig.call(lambda: setattr(rig.pump._stdin, "_echoed", True))
        slow, typist = rig.open(buffer=SMALL), rig.open()
        sent = numbered(slow.base, 30)
        rig.io.sendall(sent)
        rig.wait(paused, "the VM waits")
        typist.send(bytes(400))
        assert read_frames(rig.io, 1) == [Frame(typist.base, bytes(400))]
        threading.Event().wait(0.2)
        assert len(frames_of(read_now(rig.io))) <= 1, "one marker"
        assert read_exact(slow.sock, len(sent)) == sent
        assert read_frames(rig.io, 1)[0].seq >= MARKER, "now it is"


def test_agent_that_never_echoes(space: SpoolSpace, logged: Logged) -> None:
    with Rig(space, window=512, echo_timeout=0.01) as rig:
        stream = rig.open()
        data = random.Random(2).randbytes(10_000)
        stream.send(data)
        taken = b""
        while len(taken) < len(data):
            taken += b"".join(payload for _, payload in read_frames(rig.io, 1))
        assert taken == data
        assert logged.at(logging.WARNING) == ["the agent does not acknowledge stdin: it is sent unpaced"]
        late = rig.open()
        late.send(bytes(4_000))
        assert read_frames(rig.io, 1) == [(late.base, bytes(4_000))]


# Waiting costs nothing ------------------------------------------------------------------------------------


def vm_that_reads_nothing_with_a_marker_due(rig: Rig) -> None:
    stream = rig.open()
    stream.send(bytes(600))
    rig.wait(lambda pump: bool(pump._stdin.asked), "a marker is on its way")
    fill(rig.pump._io)
    rig.wait(blocked, "it is asked for again in vain")


def vm_that_reads_nothing_while_clients_send(rig: Rig) -> None:
    streams = [rig.open() for _ in range(3)]
    fill(rig.pump._io)
    streams[0].send(b"x")
    rig.wait(blocked, "the VM takes nothing")
    streams[1].send(b"x")
    streams[2].close()


def lost_control_channel_behind_a_client_that_reads_nothing(rig: Rig) -> None:
    stall(rig, rig.open(buffer=SMALL))
    rig.ctl.close()
    wait_until(lambda: bool(rig.owner.causes), "it is noticed")


def client_that_reads_nothing(rig: Rig) -> None:
    stall(rig, rig.open(buffer=SMALL))


def full_spool(rig: Rig) -> None:
    rig.open(buffer=SMALL)
    rig.io.sendall(numbered(1, 60))
    rig.wait(paused, "the VM waits")


def vm_that_hung_up_behind_a_full_spool(rig: Rig) -> None:
    full_spool(rig)
    rig.io.close()
    wait_until(lambda: bool(rig.owner.causes), "it is noticed")


def vm_that_takes_no_more_behind_a_full_spool(rig: Rig) -> None:
    full_spool(rig)
    rig.io.shutdown(socket.SHUT_RD)
    rig.open().send(b"x")
    wait_until(lambda: bool(rig.owner.causes), "it is noticed")


def client_that_hung_up_while_its_marker_is_on_its_way(rig: Rig) -> None:
    stream = rig.open()
    stream.send(bytes(5_000))
    rig.wait(lambda pump: bool(pump._stdin.asked), "a marker is on its way")
    stream.close()


def client_that_half_closed(rig: Rig) -> None:
    rig.open().sock.shutdown(socket.SHUT_WR)


def control_channel_in_use(rig: Rig) -> None:
    taker = threading.Thread(target=rig.control._turn.acquire)
    taker.start()
    taker.join(WAIT)
    rig.ctl.sendall(command(ASYNC_EVENT))
    rig.control._unasked.modify(rig.control._sock, 0)


@pytest.mark.parametrize(
    "wait_for",
    [
        vm_that_reads_nothing_with_a_marker_due,
        vm_that_reads_nothing_while_clients_send,
        client_that_reads_nothing,
        lost_control_channel_behind_a_client_that_reads_nothing,
        full_spool,
        vm_that_hung_up_behind_a_full_spool,
        vm_that_takes_no_more_behind_a_full_spool,
        client_that_hung_up_while_its_marker_is_on_its_way,
        client_that_half_closed,
        control_channel_in_use,
    ],
)
def test_waiting_for_it_takes_no_turns(
    tmp_path: Path, impatient: None, wait_for: Callable[[Rig], None]
) -> None:
    with Rig(spool_space(tmp_path, session_limit=20_000), window=512, echo_timeout=0.05) as rig:
        rig.call(lambda: setattr(rig.pump._stdin, "_echoed", True))
        wait_for(rig)
        rig.call(lambda: None)
        turns = 0
        turn = rig.pump._turn

        def counted() -> None:
            nonlocal turns
            turns += 1
            turn()

        rig.pump._turn = counted  # type: ignore[method-assign]  # of this one alone
        rig.call(lambda: None)
        threading.Event().wait(0.2)
        if rig.control._turn.locked():
            rig.control._turn.release()
        assert turns <= 20


# The console ----------------------------------------------------------------------------------------------


def test_console_is_logged_until_it_ends_and_the_pump_goes_on(space: SpoolSpace, logged: Logged) -> None:
    logger.setLevel(CONSOLE)
    near, far = pair()
    near.setblocking(False)
    with far, Rig(space, console=Console("vm", near)) as rig:
        far.sendall(b"booting\nlog")
        wait_until(lambda: len(logged.fields("console")) == 1, "a line")
        far.sendall(b"in: \n# ")
        wait_until(lambda: len(logged.fields("console")) == 2, "another line")
        far.close()
        wait_until(lambda: near.fileno() == -1, "the console is closed")
        assert [fields["line"] for fields in logged.fields("console")] == ["booting", "login: ", "# "]
        # Its fd is the next session's, which is watched like any other.
        stream = rig.open(buffer=SMALL)
        sent = stall(rig, stream)
        assert read_exact(stream.sock, len(sent)) == sent


# Many threads ---------------------------------------------------------------------------------------------


def test_many_threads_open_sessions_while_frames_flow(rig: Rig) -> None:
    opening = threading.Lock()  # guards the rig's own count

    def use() -> None:
        for _ in range(40):
            with opening:
                session, stream = rig.session()
            assert rig.pump.add(session)
            rig.io.sendall(frame(stream.base, b"out"))
            assert stream.read_frame() == (stream.base, b"out")
            stream.close()

    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(in_background(use))
    rig.wait(lambda pump: not pump._sessions and not pump._owners, "all are closed")
    assert rig.call(lambda: rig.pump.counters.stray_frames) == 0


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_output_that_cannot_be_passed_on_is_said_and_its_client_sees_the_end(
    space: SpoolSpace, monkeypatch: pytest.MonkeyPatch, logged: Logged, spooled: bool, number: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with Rig(space) as rig:
        stream, other = rig.open(buffer=4_096 if spooled else None), rig.open()
        if spooled:
            for _ in range(8):
                rig.io.sendall(frame(stream.base, bytes(60_000)))
            rig.wait(lambda pump: any(session.spooled for session in pump._sessions), "it is spooled")
        with monkeypatch.context() as patch:
            patch.setattr(os, "sendfile", fail)
            patch.setattr(session_module, "send_pieces", fail)
            if not spooled:
                rig.io.sendall(frame(stream.base, b"lost"))
            while stream.sock.recv(65_536):
                pass
        rig.wait(lambda pump: len(pump._sessions) == 1, "its session is closed")
        assert logged.fields("output lost: its stream is closed") == [
            {"vm": "", "stream": stream.base, "pid": 0, "uid": os.geteuid(), "error": os.strerror(number)}
        ]
        rig.io.sendall(frame(other.base, b"x"))
        assert other.read_frame().payload == b"x"
        assert not rig.owner.over.is_set()


class Contended:
    """A user's share, as far as a pump needs it, while others are at work."""

    exempt = False

    def __init__(self) -> None:
        self.others = self.contended = True
        self.spent: list[float] = []
        self.due = 0.0
        self.pumping = threading.Lock()
        self.last_turn: object = None
        self.disturbed: Share | None = None

    def one_pump(self) -> threading.Lock:
        return self.pumping

    def book(self) -> float:
        return time.monotonic() + self.due

    def works(self, in_haste: bool = False) -> None:
        pass

    def spend(self, seconds: float, stretch: float, more: float = 0.0) -> None:
        assert 0 <= stretch <= seconds
        self.spent.append(seconds)


def test_turns_are_paid_for_while_others_are_there(space: SpoolSpace) -> None:
    share = Contended()
    with Rig(space, share=cast(Share, share)) as rig:
        stream = rig.open()
        for number in range(3):
            rig.io.sendall(frame(stream.base, b"%d" % number))
            assert stream.read_frame().payload == b"%d" % number
        rig.call(lambda: None)
        assert len(share.spent) >= 3
        assert min(share.spent) > 0
        share.others = False
        rig.call(lambda: None)  # the turn in which that was seen may have been paid for
        before = len(share.spent)
        rig.io.sendall(frame(stream.base, b"more"))
        assert stream.read_frame().payload == b"more"
        rig.call(lambda: None)
        assert len(share.spent) == before


def wait_until_it_waits(rig: Rig) -> object:
    """Until the pump has nothing to do; returns that wait."""
    rig.settle()
    wait_until(lambda: rig.pump._wait_now is not None, "it waits")
    return rig.pump._wait_now


def test_who_waits_is_not_woken_to_say_how_things_stand(rig: Rig) -> None:
    stream = rig.open()
    rig.io.sendall(frame(stream.base, b"x"))
    wait = wait_until_it_waits(rig)
    streams = rig.pump.describe()
    assert isinstance(streams, Streams)
    assert (streams.sessions, streams.traffic.frames_to_clients) == (1, 1)
    assert rig.pump._wait_now is wait


def test_who_has_mail_says_how_things_stand_after_it(rig: Rig) -> None:
    wait_until_it_waits(rig)
    session, _ = rig.session()
    rig.pump._mailbox._letters.append(lambda: rig.pump._add(session))  # it will be woken in a moment
    asked = rig.pump.describe()
    assert isinstance(asked, Future)
    assert asked.result(WAIT).sessions == 1


@pytest.mark.parametrize("torn", [False, True])
def test_what_was_read_while_the_pump_began_to_work_does_not_count(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    stream = rig.open()
    wait_until_it_waits(rig)
    me = threading.get_ident()

    def describe(*them: Any) -> Streams:
        streams = describe_streams(*them)
        if threading.get_ident() == me:
            rig.io.sendall(frame(stream.base, b"x"))
            assert stream.read_frame().payload == b"x"
            if torn:
                raise RuntimeError("Set changed size during iteration")
        return streams

    monkeypatch.setattr("cc_proxy.proxy.streams.pump.describe_streams", describe)
    asked = rig.pump.describe()
    assert isinstance(asked, Future)
    assert asked.result(WAIT).traffic.frames_to_clients == 1


def test_who_fails_while_it_waits_does_not_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.call(lambda: monkeypatch.setattr(rig.pump, "_wait_for", lambda timeout: 1 / 0))
    rig.wait_ended()
    assert rig.pump._wait_now is None
    asked = rig.pump.describe()
    assert isinstance(asked, Future)
    assert asked.cancelled()


def test_who_rests_does_what_others_ask_meanwhile(space: SpoolSpace) -> None:
    share = Contended()
    with Rig(space, share=cast(Share, share)) as rig:
        stream = rig.open()

        def end_turn() -> None:
            share.due = 2 * WAIT
            rig.pump._turns._until = 0.0

        rig.call(end_turn)
        rig.io.sendall(frame(stream.base, b"x"))
        streams = rig.streams()
        assert (streams.sessions, streams.traffic.frames_to_clients) == (1, 0)
        rig.pump.abort()
        assert rig.owner.over.wait(WAIT)


class Counted(Eager):
    """Looks once, and counts how often it was to."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, look: Callable[[], T | None], sleep: Callable[[], T]) -> T:
        self.waits += 1
        return look() or sleep()


def converse(rig: Rig) -> int:
    """Have the client and the VM speak in turn; returns how often the pump waited eagerly meanwhile."""
    stream = rig.open()
    eager = Counted()
    rig.call(lambda: setattr(rig.pump, "_eager", eager))
    for _ in range(4):
        stream.send(b"question")
        assert read_frames(rig.io, 1) == [(stream.base, b"question")]
        rig.io.sendall(frame(stream.base, b"answer"))
        assert stream.read_frame().payload == b"answer"
    rig.settle()
    return eager.waits


def test_answer_is_waited_for_eagerly(rig: Rig) -> None:
    assert converse(rig) >= 4


def test_who_speaks_without_end_is_not_waited_for_eagerly(rig: Rig) -> None:
    stream = rig.open()
    eager = Counted()
    rig.io.sendall(frame(stream.base, b"first"))
    assert stream.read_frame().payload == b"first"
    rig.io.sendall(frame(stream.base, b"second"))
    assert stream.read_frame().payload == b"second"
    rig.call(lambda: setattr(rig.pump, "_eager", eager))
    for _ in range(4):
        rig.io.sendall(frame(stream.base, b"more"))
        assert stream.read_frame().payload == b"more"
    rig.settle()
    assert eager.waits == 0


def test_nobody_is_waited_for_eagerly_while_others_are_at_work(space: SpoolSpace) -> None:
    share = Contended()
    with Rig(space, share=cast(Share, share)) as rig:
        assert converse(rig) == 0
        share.contended = False
        assert converse(rig) >= 4
