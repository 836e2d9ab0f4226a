"""A pump's thread: what others may ask of it meanwhile, how it ends, and what an error costs."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from cc_proxy.continuity.memory import private_memory
from cc_proxy.linux.selector import Selector
from cc_proxy.proxy.streams.channel import Channel
from cc_proxy.proxy.streams.interfaces import Pacing, Sockets
from cc_proxy.proxy.streams.output import Output
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.streams.stdin import Stdin
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink
from tests.faults import broken
from tests.proxy.conftest import Logged
from tests.proxy.support import (
    NEVER,
    Ends,
    Rig,
    frames_of,
    new_user,
    open_fds,
    pair,
    read_frames,
    read_to_end,
    spool_files,
)
from tests.shortages import no_threads
from tests.wire.support import (
    ASYNC_EVENT,
    WAIT,
    Stream,
    at_end,
    command,
    frame,
    in_background,
    read_exact,
    wait_until,
)

SMALL = 4_608


def refused_session(rig: Rig) -> Session:
    """A session that is closed by whoever refuses it."""
    session, _ = rig.session()
    session.close()
    return session


def stall(rig: Rig, stream: Stream) -> bytes:
    """Output on a stream until some of it waits in the spool; returns it."""
    sent = b""
    while not rig.streams().spooled:
        more = frame(stream.base, b"x" * 2_000)
        rig.io.sendall(more)
        sent += more
        rig.settle()
    return sent


# Copying --------------------------------------------------------------------------------------------------


def test_frames_go_both_ways_until_the_vm_hangs_up(rig: Rig) -> None:
    stream = rig.open()
    rig.io.sendall(frame(stream.base, b"out"))
    assert stream.read_frame().payload == b"out"
    stream.send(b"in")
    assert read_frames(rig.io, 1) == [(stream.base, b"in")]
    rig.io.sendall(frame(stream.base, b"last"))
    rig.io.close()
    assert read_to_end(stream.sock) == frame(stream.base, b"last")
    rig.wait_ended()
    assert set(rig.owner.causes) == {"the VM hung up its I/O channel"}


def test_patience_with_a_client_ends_without_anything_happening(rig: Rig) -> None:
    slow, other = rig.open(buffer=SMALL), rig.open()
    sent = stall(rig, slow)
    rig.io.sendall(frame(other.base, b"out"))
    assert other.read_frame().payload == b"out"
    assert read_exact(slow.sock, len(sent)) == sent


def test_session_is_known_to_the_pump_before_what_the_vm_sends_for_it_is_read(rig: Rig) -> None:
    """Whoever learns its seq may have the VM send at once."""
    for _ in range(300):
        stream = rig.open()
        rig.io.sendall(frame(stream.base, b"at once"))
        assert stream.read_frame() == (stream.base, b"at once")
        stream.close()


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
    rig.wait(lambda streams: not streams.sessions, "all are closed")
    assert rig.pump.session_count == 0
    assert rig.streams().traffic.stray_frames == 0


# One at a time --------------------------------------------------------------------------------------------


class Gate:
    """Lets a pump work, or keeps it from that."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.passed = 0
        self.large: list[bool] = []
        self.inside = False

    @contextmanager
    def one(self, large: bool) -> Iterator[None]:
        self.large.append(large)
        self.reached.set()
        assert self.open.wait(WAIT)
        self.passed += 1
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Once the pump, which has nothing to do, waits outside."""
        wait_until(lambda: not self.inside, "it waits outside")
        self.open.clear()
        self.reached.clear()
        try:
            yield
        finally:
            self.open.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(space: SpoolSpace, gate: Gate) -> Iterator[Rig]:
    """A pump that works when the gate lets it."""
    with Rig(space, one_at_a_time=gate.one) as rig:
        yield rig


def test_pump_works_in_its_turn_and_waits_outside(gated: Rig, gate: Gate) -> None:
    stream = gated.open()
    gated.wait_for_turn()
    with gate.shut():
        passed = gate.passed
        gated.io.sendall(frame(stream.base, b"out"))
        assert gate.reached.wait(WAIT)
        stream.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            stream.sock.recv(1)
    stream.sock.settimeout(WAIT)
    assert stream.read_frame().payload == b"out"
    assert gate.passed > passed


def test_batch_after_a_large_one_is_expected_to_be_large(gated: Rig, gate: Gate) -> None:
    stream = gated.open()
    gated.wait_for_turn()
    with gate.shut():
        gated.io.sendall(frame(stream.base, bytes(8_000)) * 6)
    for _ in range(6):
        stream.read_frame()
    gated.wait_for_turn()
    assert gate.large[-1]
    assert not any(gate.large[:-1])
    gated.wait_for_turn()
    assert not gate.large[-1]


# What others ask ------------------------------------------------------------------------------------------


def test_question_is_answered_behind_what_came_before_it(gated: Rig, gate: Gate) -> None:
    with gate.shut():
        gated.open()
        answer = gated.pump.describe()
        assert not answer.done(), "and nobody has waited"
        gated.open()
    assert answer.result(WAIT).sessions >= 1
    assert gated.streams().sessions == gated.pump.session_count == 2


def test_question_is_cancelled_once_the_pump_has_ended(rig: Rig) -> None:
    rig.pump.abort()
    rig.wait_ended()
    with pytest.raises(CancelledError):
        rig.pump.describe().result(WAIT)


def test_questions_that_come_as_it_ends_are_answered_or_cancelled(rig: Rig) -> None:
    asked = [rig.pump.describe() for _ in range(5)]
    rig.pump.abort()
    while not asked[-1].cancelled():
        asked.append(rig.pump.describe())
        assert asked[-1].cancelled() or asked[-1].result(WAIT).sessions == 0
    rig.wait_ended()
    assert all(answer.done() for answer in asked)


def test_probe_is_answered_by_a_pump_that_goes_on_and_by_no_other(gated: Rig, gate: Gate) -> None:
    assert gated.pump.probe()
    gated.wait_for_turn()
    assert gated.pump.probe()
    gated.wait_for_turn()
    with gate.shut():
        assert gated.pump.probe(), "it has been asked only now"
        assert not gated.pump.probe()
        assert not gated.pump.probe()
    gated.wait_for_turn()
    assert gated.pump.probe()


def test_pump_that_has_not_begun_or_has_ended_need_not_answer_a_probe(space: SpoolSpace) -> None:
    with Rig(space, started=False) as rig:
        assert rig.pump.probe()
        assert rig.pump.probe()
        assert not rig.pump.join(0), "it has not ended either"
        rig.pump.start()
        rig.pump.abort()
        rig.wait_ended()
        assert rig.pump.probe()
        assert rig.pump.probe()


# Its end --------------------------------------------------------------------------------------------------


def test_finish_waits_for_its_moment(rig: Rig) -> None:
    stream = rig.open()
    rig.pump.finish("later", NEVER)
    rig.io.sendall(frame(1, b"goes on"))
    assert stream.read_frame().payload == b"goes on"
    assert not rig.pump.join(0)
    rig.pump.finish("over", 0.01)
    assert at_end(stream.sock)
    assert at_end(rig.io)
    rig.wait_ended()
    assert rig.owner.causes == ["over"]


def close_control(rig: Rig) -> None:
    rig.ctl.close()


def finish(rig: Rig) -> None:
    rig.pump.finish("the test ends")


@pytest.mark.parametrize("end", [close_control, finish])
def test_vm_that_sends_without_end_ends_all_the_same(rig: Rig, end: Callable[[Rig], None]) -> None:
    stream = rig.open()
    data = frame(1, b"x" * 2_000) * 30

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


def test_pump_that_has_ended_takes_nothing_and_minds_nothing(rig: Rig) -> None:
    stream = rig.open()
    rig.pump.abort()
    rig.wait_ended()
    assert at_end(stream.sock)
    assert at_end(rig.io)
    assert at_end(rig.ctl)
    assert not rig.pump.add(refused_session(rig))
    rig.pump.abort()
    rig.pump.finish("the test ends")
    assert rig.owner.causes == []


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
    rig.pump.abort()
    rig.wait_ended()
    ours = {rig.io.fileno(), rig.ctl.fileno(), far.fileno()} | {stream.sock.fileno() for stream in streams}
    assert set(open_fds()) - set(before) == ours
    rig.close()
    far.close()


@pytest.mark.parametrize("watched", [0, 1, 2, 3, 4])
def test_pump_that_cannot_be_made_leaves_its_callers_sockets_alone_and_nothing_open(
    space: SpoolSpace, watched: int
) -> None:
    """Though it has begun to watch some of them."""
    numbers = itertools.count()
    refusing = broken(
        Selector, "add", OSError("no room for another fd"), when=lambda *_: next(numbers) >= watched
    )
    with Ends(space) as ends, ends.near_io:
        before = open_fds()
        with refusing, pytest.raises(OSError, match="no room"):
            Pump(
                ends.owner,
                Sockets(ends.near_io, ends.control, None),
                private_memory(),
                new_user().one_batch,
                Pacing(NEVER, print),
            )
        after = open_fds()
        ends.control.close()
        assert after == before
        ends.near_io.send(b"still open")


def test_thread_that_cannot_be_had_leaves_nothing_open(space: SpoolSpace) -> None:
    with Rig(space, started=False) as rig:
        early, answer = rig.open(), rig.pump.describe()
        with no_threads(), pytest.raises(RuntimeError, match="can't start new thread"):
            rig.pump.start()
        assert at_end(early.sock)
        assert answer.done()
        assert at_end(rig.io)
        assert at_end(rig.ctl)
        assert not rig.pump.add(refused_session(rig))
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
    ("part", "method", "poke"),
    [
        (Output, "read", poke_output),
        (Session, "deliver", poke_output),
        (Output, "flush", poke_writable),
        (Stdin, "read_clients", poke_stdin),
        (Session, "read", poke_stdin),
        (Selector, "change", poke_end),
        (Stdin, "add", poke_mail),
        (ControlLink, "read", poke_control),
        (Channel, "serve", poke_output),
        (Channel, "wait", poke_output),
    ],
)
def test_error_that_nobody_expects_costs_that_vm_alone_and_leaks_nothing(
    space: SpoolSpace,
    logged: Logged,
    part: type,
    method: str,
    poke: Callable[[Rig, Stream], None],
    tmp_path: Path,
) -> None:
    """The leak fixture looks at what is left open."""
    with Rig(space, vm="broken") as rig, Rig(space, vm="other") as other:
        streams = [rig.open(buffer=SMALL) for _ in range(2)]
        theirs = other.open()
        rig.wait_for_turn()  # or it would be these whose taking over fails
        with broken(part, method, when=lambda *_: threading.current_thread().name == "pump broken"):
            poke(rig, streams[0])
            rig.wait_ended()
        for stream in streams:
            read_to_end(stream.sock)
        assert at_end(rig.io)
        assert set(rig.owner.causes) == {"internal error in its I/O pump"}
        assert logged.at(logging.ERROR) == ["I/O pump failed"]
        assert (space.used, spool_files(tmp_path)) == (0, 0)
        other.io.sendall(frame(theirs.base, b"out"))
        assert theirs.read_frame().payload == b"out"
        assert other.owner.causes == []
