"""From the clients to one VM, a step at a time: pacing, the end of stdin, and a VM that takes nothing."""

from __future__ import annotations

import logging
import math
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cc_proxy.continuity.cells import NO_CELL
from cc_proxy.continuity.memory import private_memory
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.linux.selector import NOTHING_ELSE, Selector
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.pacer import Pacer
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.streams.stdin import Stdin
from tests.clock import Clock
from tests.faults import broken
from tests.proxy.conftest import Logged
from tests.proxy.support import fill, frames_of, new_session, pair, read_now
from tests.wire.support import FRAME, MARKER, Frame, frame, is_silent, unread_by_peer

WINDOW = 512
ECHO_TIMEOUT = 10.0


class Bench:
    """A `Stdin` without a thread, an agent that does what the test says, and clients."""

    def __init__(self, space: SpoolSpace, clock: Clock) -> None:
        self._space = space
        self.clock = clock
        self._stack = ExitStack()
        self._owners: dict[int, Session] = {}
        self._buffered = b""
        self.dropped: list[tuple[int, str]] = []
        self.io, self.agent = pair()
        self.io.setblocking(False)
        self.io.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.clients = Selector()
        #: What asks the agent on the control channel, by what it calls back.
        self.rounds: list[Callable[[bool], None]] = []
        self.pacer = Pacer(self.io, self._owners, ECHO_TIMEOUT, self._ask, NO_CELL, self.resume)
        self.stdin = Stdin("vm", self.io, private_memory(), self.clients, self.pacer, self.drop)
        for end in (self.io, self.agent, self.clients):
            self._stack.callback(end.close)

    def _ask(self, _commands: int, call_back: Callable[[bool], None]) -> None:
        self.rounds.append(call_back)

    def resume(self, session: Session) -> None:
        self.stdin.resume(session)

    def drop(self, session: Session, reason: str) -> None:
        """What the pump does about it."""
        self.dropped.append((session.seqs.start, reason))
        for seq in session.seqs:
            del self._owners[seq]
        self.stdin.forget(session)
        session.close()

    def open(self, window: int = WINDOW, streams: int = 2) -> tuple[Session, socket.socket]:
        near, far = pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        base = max([0, *self._owners, *(seq for seq, _ in self.dropped)]) + 2
        paced = StdinWindow(base, window) if window else None
        session = new_session(range(base, base + streams), near, self._space, paced)
        self._owners |= dict.fromkeys(session.seqs, session)
        self._stack.callback(far.close)
        self._stack.callback(session.close)
        session.is_started = True
        self.stdin.add(session)
        self.resume(session)
        return session, far

    def asked(self) -> bool:
        return bool(self.pacer.asked)

    def blocked(self) -> bool:
        return bool(self.stdin.to_vm)

    def error(self) -> str | None:
        return self.stdin.error

    def read_clients(self) -> None:
        self.stdin.read_clients(self.clients.poll(0))

    def turn(self) -> list[Frame]:
        """Reads the clients once; returns what that brought the agent, which reads it all."""
        if self.clients.poll(0):
            self.read_clients()
        data = read_now(self.agent)
        while self.stdin.to_vm:
            self.stdin.flush()
            data += read_now(self.agent)
        return frames_of(data)

    def turns(self) -> list[Frame]:
        """As many turns as it takes until there is nothing more to read."""
        frames = self.turn()
        for _ in range(1_000):
            if not self.clients.poll(0):
                return frames
            frames += self.turn()
        raise AssertionError("there is always something to read")

    def step(self) -> None:
        """What the pump does when it has nothing to wait for, and a second passes."""
        if self.stdin.to_vm:
            self.stdin.flush()
        elif self.clients.poll(0):
            self.read_clients()
        self.clock.now += 1
        self.stdin.run_timers(self.clock.now)

    def acknowledge_once(self) -> None:
        """Let it know that the agent sends markers back."""
        session, client = self.open()
        client.sendall(frame(session.seqs.start, bytes(WINDOW)))
        (marker,) = markers_of(self.turn())
        self.pacer.echo(marker, 0)
        self.turn()
        self.drop(session, "all is sent")

    def arrived(self) -> list[Frame]:
        return frames_of(read_now(self.agent))

    def pass_time(self, seconds: float) -> list[Frame]:
        self.clock.now += seconds
        self.stdin.run_timers(self.clock.now)
        return self.arrived()

    def answer(self, answered: bool = True) -> None:
        """What asks the agent on the control channel is answered, or given up."""
        rounds, self.rounds[:] = self.rounds[:], []
        for call_back in rounds:
            call_back(answered)

    def echo_nothing(self) -> list[Frame]:
        """The agent answers commands and sends no marker back, until all has arrived; what it gets."""
        frames: list[Frame] = []
        for _ in range(100):
            if not self.asked():
                return frames
            frames += self.pass_time(ECHO_TIMEOUT) + self.pass_time(0)
            self.answer()
            frames += self.turns()
        raise AssertionError("it is asked for ever")

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def bench(space: SpoolSpace, clock: Clock) -> Iterator[Bench]:
    bench = Bench(space, clock)
    yield bench
    bench.close()


def data_of(frames: list[Frame], seq: int) -> bytes:
    return b"".join(frame.payload for frame in frames if frame.seq == seq)


def markers_of(frames: list[Frame]) -> list[int]:
    return [frame.seq for frame in frames if frame.seq >= MARKER]


def test_all_that_the_clients_sent_goes_out_in_one_write(bench: Bench) -> None:
    clients = [bench.open() for _ in range(5)]
    for number, (session, client) in enumerate(clients):
        client.sendall(frame(session.seqs.start, b"%d" % number) * 2)
    writes: list[socket.socket] = []
    with broken(socket.socket, "sendmsg", when=lambda sock, *_: writes.append(sock)):
        frames = bench.turn()
    assert len(writes) == 1
    assert sorted(frames) == sorted(
        Frame(session.seqs.start, b"%d" % number)
        for number, (session, _) in enumerate(clients)
        for _ in range(2)
    )
    assert bench.stdin.bytes == 5 * 2 * 13


def test_no_more_than_a_window_is_on_its_way(bench: Bench) -> None:
    """The agent keeps 512 bytes for a process, and gives them to it only when it is told to here."""
    rng = random.Random(1)
    clients = [bench.open() for _ in range(3)]
    sent: dict[int, bytes] = {}
    for session, client in clients:
        base = session.seqs.start
        payloads = [rng.randbytes(rng.randrange(1, 2_000)) for _ in range(30)]
        sent[base] = b"".join(payloads)
        client.sendall(b"".join(frame(base, payload) for payload in payloads) + frame(base))
    taken = dict.fromkeys(sent, b"")
    ended: set[int] = set()
    kept = dict.fromkeys(sent, 0)
    unechoed: list[int] = []
    while len(ended) < 3:
        for seq, payload in bench.turn():
            if seq >= MARKER:
                assert payload == b""
                unechoed.append(seq)
            elif payload:
                assert seq not in ended
                taken[seq] += payload
                kept[seq] += len(payload)
                assert kept[seq] <= WINDOW
            else:
                assert taken[seq] == sent[seq]
                ended.add(seq)
        assert len(set(unechoed)) == len(unechoed), "one marker of a session at a time"
        if unechoed and (rng.random() < 0.5 or not bench.clients.poll(0)):
            echo = unechoed.pop(rng.randrange(len(unechoed)))
            kept[echo & 0xFFFF] = 0
            bench.pacer.echo(echo, 0)
    assert taken == sent
    assert bench.dropped == []


@pytest.mark.parametrize("window", [1, 2, 13, 512, 4_096, 1_048_576])
def test_windows_of_any_size_let_everything_through(bench: Bench, window: int) -> None:
    session, client = bench.open(window)
    base = session.seqs.start
    data = random.Random(window).randbytes(2_000 if window < 100 else 100_000)
    stream = b"".join(frame(base, data[at : at + 900]) for at in range(0, len(data), 900)) + frame(base)
    taken: list[Frame] = []
    client.sendall(stream)
    while not taken or taken[-1] != (base, b""):
        frames = bench.turn()
        assert len(data_of(frames, base)) <= window
        taken += [frame for frame in frames if frame.seq == base]
        for seq in markers_of(frames):
            bench.pacer.echo(seq, 0)
    assert data_of(taken, base) == data


def test_while_a_marker_is_on_its_way_that_client_waits_and_others_do_not(bench: Bench) -> None:
    (session, client), (other, other_client) = bench.open(), bench.open()
    client.sendall(frame(session.seqs.start, bytes(1_000)))
    other_client.sendall(frame(other.seqs.start, b"1"))
    frames = bench.turns()
    assert markers_of(frames) == [MARKER + session.seqs.start]
    assert Frame(other.seqs.start, b"1") in frames
    other_client.sendall(frame(other.seqs.start, b"2"))
    assert bench.turns() == [(other.seqs.start, b"2")]
    assert bench.asked()
    bench.pacer.echo(MARKER + session.seqs.start, 0)
    assert not bench.asked()
    assert data_of(bench.turns(), session.seqs.start) == bytes(500)


def test_marker_that_does_not_come_back_is_asked_for_again(bench: Bench) -> None:
    session, client = bench.open()
    base = session.seqs.start
    client.sendall(frame(base, bytes(2_000)))
    (first,) = markers_of(bench.turns())
    bench.pacer.echo(first, 0)
    (second,) = markers_of(bench.turns())
    assert bench.pacer.moment() == 1_000.0 + ECHO_TIMEOUT
    assert bench.pass_time(ECHO_TIMEOUT - 0.1) == []
    seqs = [second]
    for _ in range(10):
        ((seq, payload),) = bench.pass_time(ECHO_TIMEOUT)
        assert payload == b""
        assert seq >= MARKER
        seqs.append(seq)
        assert bench.turns() == [], "the window is shut as long as that"
    assert len(set(seqs)) == 1, "whichever comes back says that there is room"
    bench.pacer.echo(second, 0)
    frames = bench.turns()
    assert data_of(frames, base)
    (third,) = markers_of(frames)
    for late in seqs:
        bench.pacer.echo(late, 0)
        assert bench.asked()
        assert bench.turns() == []
    bench.pacer.echo(third, 0)
    assert data_of(bench.turns(), base)


def test_agent_that_always_takes_longer_than_it_is_waited_for(bench: Bench, logged: Logged) -> None:
    """Each marker comes back when it has been asked for again, and again."""
    session, client = bench.open()
    base = session.seqs.start
    data = bytes(10 * WINDOW)
    client.sendall(frame(base, data))
    echoes: list[int] = []
    frames = bench.turns()
    taken = data_of(frames, base)
    for _ in range(100):
        echoes += markers_of(frames)
        frames = bench.pass_time(ECHO_TIMEOUT)
        if len(echoes) > 2:
            bench.pacer.echo(echoes.pop(0), 0)
        frames += bench.turns()
        taken += data_of(frames, base)
    assert taken == data
    assert logged.at(logging.WARNING) == []


def test_markers_of_many_sessions_are_asked_for_again_each_in_its_time(bench: Bench) -> None:
    clients = [bench.open() for _ in range(3)]
    for session, client in clients:
        client.sendall(frame(session.seqs.start, bytes(600)))
        assert len(markers_of(bench.turns())) == 1
        bench.pass_time(1)
    bases = [session.seqs.start for session, _ in clients]
    assert bench.pacer.moment() == 1_000 + ECHO_TIMEOUT
    asked = [[seq & 0xFFFF for seq, _ in bench.pass_time(1)] for _ in range(16)]
    assert [bases for bases in asked if bases] == [[bases[0]], [bases[1]], [bases[2]]]
    bench.pacer.echo(MARKER + bases[0], 0)
    again = [[seq & 0xFFFF for seq, _ in bench.pass_time(1)] for _ in range(6)]
    assert [bases for bases in again if bases] == [[bases[1]], [bases[2]]]


def test_agent_that_never_echoes_is_sent_everything_paced_by_commands(bench: Bench) -> None:
    clients = [bench.open() for _ in range(3)]
    for session, client in clients:
        client.sendall(frame(session.seqs.start, bytes(5_000)))
    frames = bench.turns()
    frames += bench.echo_nothing()
    assert bench.pacer.moment() == math.inf
    for session, _ in clients:
        assert data_of(frames, session.seqs.start) == bytes(5_000)
    assert len(markers_of(frames)) >= 3 * 5_000 // WINDOW


def test_late_echoes_of_an_agent_that_answered_commands_make_no_room(bench: Bench) -> None:
    """All its markers come back late: each is only of what was sent before it."""
    session, client = bench.open()
    base = session.seqs.start
    client.sendall(frame(base, bytes(5_000)))
    markers = markers_of(bench.turns())
    markers += markers_of(bench.echo_nothing())
    assert len(markers) > 3
    bench.pacer.echo(markers[0], 0)
    client.sendall(frame(base, bytes(5_000)))
    frames = bench.turns()
    for late in markers[1:]:
        bench.pacer.echo(late, 0)
        frames += bench.turns()
    assert len(data_of(frames, base)) <= WINDOW
    (marker,) = markers_of(frames)
    bench.pacer.echo(marker, 0)
    assert data_of(bench.turns(), base)


@pytest.mark.parametrize("gone", [True, False])
def test_echo_that_nobody_waits_for_is_no_matter(bench: Bench, gone: bool) -> None:
    session, client = bench.open()
    base = session.seqs.start
    client.sendall(frame(base, bytes(300)))
    (marker,) = markers_of(bench.turns())
    if gone:
        bench.drop(session, "for a reason")
    else:
        bench.pacer.echo(marker, 0)
        unpaced, _ = bench.open(0)
        bench.pacer.echo(MARKER + unpaced.seqs.start, 0)
        bench.pacer.echo(MARKER + unpaced.seqs.start + 1, 0)
    for seq in (marker, MARKER, MARKER + base + 1, MARKER + 999, 2**64 - 1):
        bench.pacer.echo(seq, 0)
    assert not bench.asked()
    assert bench.pass_time(100 * ECHO_TIMEOUT) == []


def test_session_that_ends_is_not_asked_about_again(bench: Bench) -> None:
    (session, client), (other, other_client) = bench.open(), bench.open()
    for sender, sock in ((session, client), (other, other_client)):
        sock.sendall(frame(sender.seqs.start, bytes(600)))
    bench.turns()
    bench.drop(session, "for a reason")
    assert [seq & 0xFFFF for seq, _ in bench.pass_time(ECHO_TIMEOUT)] == [other.seqs.start]


DATA, END = "data", "end"


@pytest.mark.parametrize(
    ("before", "how", "arrives"),
    [
        ((), "half", [END]),
        ((), "gone", []),
        ((DATA,), "half", [DATA, END]),
        ((DATA,), "gone", [DATA, END]),
        ((DATA, END), "half", [DATA, END]),
        ((DATA, END), "gone", [DATA, END]),
        ((END,), "half", [END]),
        ((END,), "gone", [END]),
        ((END, DATA), "half", [END, DATA, END]),
        ((END, DATA), "gone", [END, DATA, END]),
    ],
)
def test_the_end_of_stdin(bench: Bench, before: tuple[str, ...], how: str, arrives: list[str]) -> None:
    """Closing the direction is end of file. So is closing the fd in the middle of sending stdin."""
    session, client = bench.open()
    base = session.seqs.start
    stream = b"".join(frame(base, b"stdin" if part is DATA else b"") for part in before)
    client.sendall(stream)
    if how == "half":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()
    assert bench.turns() == [(base, b"stdin" if part is DATA else b"") for part in arrives]
    assert bench.dropped == ([] if how == "half" else [(base, "closed by its client")])
    assert session.stdin_open is False


@pytest.mark.parametrize("how", ["half", "gone"])
@pytest.mark.parametrize("rest", [0, 1, 500])
def test_the_end_of_stdin_in_the_middle_of_a_frame(bench: Bench, how: str, rest: int) -> None:
    """What came of it has gone on already, so there is no half frame to be seen."""
    session, client = bench.open()
    base = session.seqs.start
    client.sendall(frame(base, bytes(100)) + frame(base, bytes(rest), length=5_000))
    if how == "half":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()
    frames = bench.turns()
    while markers := markers_of(frames):
        frames = [taken for taken in frames if taken.seq not in markers]
        for marker in markers:
            bench.pacer.echo(marker, 0)
        frames += bench.turns()
    assert data_of(frames, base) == bytes(100 + rest)
    assert frames[-1] == (base, b"")
    assert all(payload for _, payload in frames[:-1])


def test_half_closed_client_is_not_read_again_and_its_end_is_noticed(bench: Bench) -> None:
    session, client = bench.open()
    client.shutdown(socket.SHUT_WR)
    bench.turns()
    assert bench.turn() == []
    assert bench.clients.poll(0) == []
    client.close()
    assert bench.turns() == []
    assert bench.dropped == [(session.seqs.start, "closed by its client")]


def test_client_that_takes_and_sends_no_more_is_gone(bench: Bench) -> None:
    session, client = bench.open()
    client.sendall(frame(session.seqs.start, b"last"))
    client.shutdown(socket.SHUT_RDWR)
    assert bench.turns() == [(session.seqs.start, b"last"), (session.seqs.start, b"")]
    assert bench.dropped == [(session.seqs.start, "closed by its client")]


@pytest.mark.parametrize("how", ["half", "gone"])
def test_stdin_that_waits_for_its_marker_comes_before_its_end(bench: Bench, how: str) -> None:
    session, client = bench.open()
    base = session.seqs.start
    data = random.Random(3).randbytes(3_000)
    client.sendall(frame(base, data))
    frames = bench.turns()
    if how == "half":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()
    assert bench.turns() == []
    assert bench.clients.poll(0) == [], "nothing that can be done about it now"
    assert bench.dropped == []
    echoes = 0
    while markers := markers_of(frames)[echoes:]:
        for marker in markers:
            bench.pacer.echo(marker, 0)
        echoes += len(markers)
        frames += bench.turns()
    frames = [taken for taken in frames if taken.seq == base]
    assert data_of(frames, base) == data
    assert frames[-1] == (base, b"")
    assert bench.dropped == ([] if how == "half" else [(base, "closed by its client")])


def test_hang_up_seen_just_before_the_marker_came_back_costs_no_stdin(bench: Bench) -> None:
    """Both are seen in one look, and the VM's channel is served first."""
    session, far = bench.open()
    far.sendall(frame(session.seqs.start, bytes(1_000)))
    *before, marker = bench.turn()
    far.close()
    seen = bench.clients.poll(0)
    bench.pacer.echo(marker.seq, 0)
    bench.stdin.read_clients(seen)
    after = bench.arrived()
    while not bench.dropped:
        after += bench.turn()
        if bench.asked():
            bench.pacer.echo(after.pop().seq, 0)
    assert sum(len(taken.payload) for taken in before + after) == 1_000
    assert after[-1] == (session.seqs.start, b"")


def test_client_that_went_while_its_stdin_waited_is_let_go_when_pacing_stops(bench: Bench) -> None:
    (session, client), (other, other_client) = bench.open(), bench.open()
    for sender, sock in ((session, client), (other, other_client)):
        sock.sendall(frame(sender.seqs.start, bytes(3_000)))
    frames = bench.turns()
    client.close()
    other_client.close()
    bench.turns()
    frames += bench.echo_nothing()
    for sender in (session, other):
        assert data_of(frames, sender.seqs.start) == bytes(3_000)
        assert Frame(sender.seqs.start, b"") in frames
    assert sorted(seq for seq, _ in bench.dropped) == [session.seqs.start, other.seqs.start]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (frame(99, b"x"), "a frame on stream 99, which is not this client's"),
        (frame(3, b"x"), "a frame on stream 3, which is not this client's"),
        (frame(2, length=11), "a frame with a total length of 11"),
        (frame(2, length=0), "a frame with a total length of 0"),
    ],
)
def test_wrong_frame_ends_its_session_and_no_other(bench: Bench, wrong: bytes, reason: str) -> None:
    (session, client), (other, other_client) = bench.open(), bench.open()
    assert list(session.seqs) == [2, 3]
    client.sendall(frame(2, b"good") + wrong + frame(2, b"never"))
    other_client.sendall(frame(other.seqs.start, b"other"))
    assert sorted(bench.turns()) == [(2, b"good"), (other.seqs.start, b"other")]
    assert bench.dropped == [(2, reason)]
    other_client.sendall(frame(other.seqs.start, b"goes on"))
    assert bench.turns() == [(other.seqs.start, b"goes on")]


def test_vm_that_does_not_read_blocks_and_nothing_is_lost(bench: Bench) -> None:
    session, client = bench.open(0)
    base = session.seqs.start
    filled = fill(bench.io)
    client.sendall(frame(base, b"first"))
    assert bench.clients.poll(0)
    bench.read_clients()
    assert bench.blocked()
    bench.stdin.flush()
    assert bench.blocked()
    client.sendall(frame(base, b"second"))
    assert len(read_now(bench.agent)) == filled
    bench.stdin.flush()
    assert not bench.blocked()
    assert bench.turns() == [(base, b"first"), (base, b"second")]


def test_vm_that_stands_still_is_not_sent_markers_again_and_again(bench: Bench) -> None:
    """Or it finds hundreds of them for each stream, when it goes on after a minute."""
    session, client = bench.open()
    client.sendall(frame(session.seqs.start, bytes(600)))
    bench.read_clients()
    for _ in range(10):
        bench.clock.now += ECHO_TIMEOUT
        bench.stdin.run_timers(bench.clock.now)
    assert len(bench.arrived()) == 2
    for _ in range(10):
        bench.clock.now += ECHO_TIMEOUT
        bench.stdin.run_timers(bench.clock.now)
        assert len(bench.arrived()) == 1


def test_vm_that_reads_in_small_pieces_gets_every_byte(bench: Bench) -> None:
    bench.io.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_608)
    rng = random.Random(5)
    clients = [bench.open(0) for _ in range(3)]
    for session, client in clients:
        base = session.seqs.start
        client.sendall(b"".join(frame(base, rng.randbytes(rng.randrange(1, 5_000))) for _ in range(40)))
        client.shutdown(socket.SHUT_WR)
    received = bytearray()
    blocked = 0
    while bench.stdin.to_vm or bench.clients.poll(0):
        if bench.stdin.to_vm:
            blocked += 1
            received += bench.agent.recv(rng.randrange(1, 20_000))
            bench.stdin.flush()
        else:
            bench.read_clients()
    frames = frames_of(bytes(received) + read_now(bench.agent))
    assert blocked > 20
    rng = random.Random(5)
    for session, _ in clients:
        base = session.seqs.start
        sent = b"".join(rng.randbytes(rng.randrange(1, 5_000)) for _ in range(40))
        assert data_of(frames, base) == sent
        assert [payload for seq, payload in frames if seq == base][-1] == b""
        assert all(len(payload) <= 4_084 for _, payload in frames)


def test_vm_that_is_gone_is_an_error_that_stays(bench: Bench) -> None:
    session, client = bench.open()
    bench.agent.close()
    assert bench.error() is None
    for _ in range(2):
        client.sendall(frame(session.seqs.start, b"x"))
        bench.read_clients()
        assert bench.error() == "I/O channel: Broken pipe"
        assert not bench.blocked()


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_clients_that_never_stop_sending_leave_the_others_their_turn(bench: Bench, count: int) -> None:
    """Unpaced, each of them could fill the buffer alone."""
    greedy = [bench.open(0) for _ in range(count)]
    chunks = [frame(session.seqs.start, bytes(4_084)) * 50 for session, _ in greedy]
    session, client = bench.open(0)
    taken = longest = 0
    for sent in range(1, 101):
        for (_, sock), chunk in zip(greedy, chunks, strict=True):
            if unread_by_peer(sock) == 0:
                sock.sendall(chunk)
        client.sendall(frame(session.seqs.start, b"typed"))
        taken += sum(seq == session.seqs.start for seq, _ in bench.turn())
        longest = max(longest, sent - taken)
    assert longest <= 2 * count


def test_more_clients_than_the_buffer_has_room_for_are_read_later(bench: Bench) -> None:
    bench.io.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    clients = [bench.open(0) for _ in range(10)]
    for session, client in clients:
        client.sendall(frame(session.seqs.start, bytes(4_000)) * 40)
    frames = bench.turn()
    assert 0 < len({seq for seq, _ in frames}) < 10
    frames += bench.turns()
    for session, _ in clients:
        assert data_of(frames, session.seqs.start) == bytes(160_000)


def test_forgotten_session_is_not_read(bench: Bench) -> None:
    session, client = bench.open()
    client.sendall(frame(session.seqs.start, b"x"))
    bench.stdin.forget(session)
    assert bench.clients.poll(0) == []
    bench.stdin.forget(session)


def test_clients_that_are_not_read_are_still_watched_for_their_end(bench: Bench) -> None:
    session, client = bench.open()
    client.sendall(frame(session.seqs.start, bytes(5_000)))
    bench.turns()
    assert bench.clients.watches(session.fd)
    bench.clients.change(session.fd, NOTHING_ELSE)
    client.close()
    assert bench.clients.poll(0)
    bench.turns()
    assert not bench.clients.watches(session.fd)


def test_frames_are_dumped_as_they_go_to_the_vm(bench: Bench, logged: Logged) -> None:
    logger.setLevel(IO)
    session, client = bench.open(0)
    base = session.seqs.start
    client.sendall(frame(base, b"x" * 5_000) + frame(base)[:5])
    bench.turns()
    client.sendall(frame(base)[5:])
    bench.turns()
    assert [(fields["direction"], fields["size"]) for fields in logged.fields("frame")] == [
        ("stdin", 4_084),
        ("stdin", 916),
        ("stdin", 0),
    ]


class Whims:
    """An agent that loses echoes, answers late and reads in small pieces, and clients that stop anyhow."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self._bench = bench
        self._rng = rng
        self._clients: dict[int, socket.socket] = {}
        self._left: dict[int, bytes] = {}
        self._received = bytearray()
        self._kept: dict[int, int] = {}
        self._echoes: list[int] = []
        self.sent: dict[int, bytes] = {}
        self.frames: list[Frame] = []
        self.ended: set[int] = set()

    def open(self) -> None:
        session, client = self._bench.open()
        base = session.seqs.start
        rng = self._rng
        payloads = [rng.randbytes(rng.randrange(1, 3_000)) for _ in range(rng.randrange(1, 8))]
        self._clients[base] = client
        self._kept[base] = 0
        self.sent[base] = b"".join(payloads)
        self._left[base] = b"".join(frame(base, payload) for payload in payloads)

    def client_sends(self) -> None:
        base = self._rng.choice(list(self._left))
        size = self._rng.randrange(1, 3_000)
        client = self._clients[base]
        client.sendall(self._left[base][:size])
        self._left[base] = self._left[base][size:]
        if not self._left[base]:
            del self._left[base]
            if self._rng.random() < 0.5:
                client.shutdown(socket.SHUT_WR)
            else:
                client.close()

    def agent_reads(self) -> None:
        self._received += self._bench.agent.recv(self._rng.randrange(1, 2_000))
        while len(self._received) >= FRAME.size:
            length = FRAME.unpack_from(self._received)[1]
            if len(self._received) < length:
                break
            (taken,) = frames_of(bytes(self._received[:length]))
            del self._received[:length]
            self._handle(taken)

    def _handle(self, taken: Frame) -> None:
        self.frames.append(taken)
        if taken.seq >= MARKER:
            # All that came before is given to its process.
            self._kept[taken.seq & 0xFFFF] = 0
            if self._rng.random() < 0.7:
                self._echoes.append(taken.seq)
            return
        self._kept[taken.seq] += len(taken.payload)
        assert self._kept[taken.seq] <= WINDOW
        if not taken.payload:
            self.ended.add(taken.seq)

    def turn(self) -> None:
        if self._left and self._rng.random() < 0.3:
            self.client_sends()
        self._bench.step()
        if not is_silent(self._bench.agent):
            self.agent_reads()
        if self._echoes and self._rng.random() < 0.5:
            self._bench.pacer.echo(self._echoes.pop(0), 0)


@pytest.mark.parametrize("seed", range(5))
def test_every_byte_of_every_client_whatever_the_agent_does(bench: Bench, seed: int) -> None:
    bench.io.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_608)
    bench.acknowledge_once()
    whims = Whims(bench, random.Random(seed))
    for _ in range(6):
        whims.open()
    for _ in range(100_000):
        whims.turn()
        if len(whims.ended) == 6:
            break
    assert {base: data_of(whims.frames, base) for base in whims.sent} == whims.sent
    assert whims.ended == set(whims.sent)
    assert any(seq & ~MARKER > 0xFFFF for seq in markers_of(whims.frames)), "some were asked for again"
