"""Stdin, client to VM: splitting, pacing, half-close (docs/protocol.md, 3 and the agent's stdin)."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.wire.daemon import PATIENT, Pod, Wire, own_daemon
from tests.wire.support import MARKER, OK, Frame, Stream, frame, in_background, is_silent

WINDOW = 512


class Agent:
    """Counts what it would have to keep, as hyperstart does; echoes markers when the test says."""

    def __init__(self, pod: Pod) -> None:
        self.vm = pod.vm
        self.taken: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.held: dict[int, int] = {}
        self.markers: deque[tuple[int, int, int]] = deque()  # seq, the stream it is for, bytes before it
        self._last_base = 0

    def read(self) -> Frame:
        taken = self.vm.read_frame()
        if taken.seq >= MARKER:
            assert taken.payload == b"", "a marker is an empty frame"
            base = (taken.seq & 0xFFFFFFFF) or self._last_base
            self.markers.append((taken.seq, base, self.held.get(base, 0)))
        elif taken.payload:
            assert taken.seq not in self.ended, "data behind the end of file"
            self.taken.setdefault(taken.seq, bytearray()).extend(taken.payload)
            self.held[taken.seq] = self.held.get(taken.seq, 0) + len(taken.payload)
            assert self.held[taken.seq] <= WINDOW, "hyperstart would have lost some"
            self._last_base = taken.seq
        else:
            self.ended.add(taken.seq)
        return taken

    def read_marker(self) -> None:
        while self.read().seq < MARKER:
            pass

    def echo(self) -> None:
        """Of the oldest marker: what came before it has been handled."""
        seq, base, before = self.markers.popleft()
        self.held[base] -= before
        self.markers = deque((s, b, n - before if b == base else n) for s, b, n in self.markers)
        self.vm.send_frame(seq)


def probe(agent: Agent, other: Stream) -> None:
    """Nothing was sent in between: what another stream sends is what comes next."""
    other.send(b"?")
    assert agent.read() == (other.base, b"?")


def test_no_more_than_512_bytes_go_out_before_the_marker_came_back(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.open(), pod.open(client=wire.attached(pod))
    agent = Agent(pod)
    data = random.Random(3).randbytes(4_000)
    stream.send(data)
    for _ in range(3):
        agent.read_marker()
        probe(agent, other)
        agent.echo()
    while len(agent.taken[stream.base]) < len(data):
        agent.read()
        if agent.markers:
            agent.echo()
    assert agent.taken[stream.base] == data


def test_marker_is_on_a_seq_that_is_never_allocated_and_its_echo_reaches_no_client(wire: Wire) -> None:
    pod = wire.pod()
    streams = [pod.open(), pod.open(client=wire.attached(pod))]
    agent = Agent(pod)
    streams[0].send(b"x" * 600)
    agent.read_marker()
    assert agent.markers[0][0] >= MARKER
    agent.echo()
    while len(agent.taken[1]) < 600:
        agent.read()
    for stream in streams:
        pod.vm.send_frame(stream.base, b"out")
        assert stream.read_frame() == (stream.base, b"out")


@pytest.mark.parametrize("payload", [b"", b"x"])
def test_marker_seqs_that_the_vm_makes_up_harm_nobody(wire: Wire, payload: bytes) -> None:
    pod = wire.pod()
    stream = pod.open()
    for offset in (0, 1, 2, 3, 100, 2**63 - 1):
        pod.vm.send_frame(MARKER + offset, payload)
    pod.vm.send_frame(1, b"out")
    assert stream.read_frame() == (1, b"out")
    stream.send(b"in")
    assert pod.vm.read_frame() == (1, b"in")
    assert pod.pings()


def test_echoes_that_nobody_asked_for_do_not_widen_the_window(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.open(), pod.open(client=wire.attached(pod))
    for _ in range(20):
        pod.vm.send_frame(MARKER + 1)
    pod.vm.send_frame(1, b"those have been read")
    stream.read_frame()
    agent = Agent(pod)
    stream.send(b"x" * 2_000)
    agent.read_marker()
    probe(agent, other)


def test_typing_costs_nothing(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    for number in range(100):
        stream.send(b"k")
        assert pod.vm.read_frame() == (1, b"k"), number


def test_sessions_do_not_wait_for_each_other(wire: Wire) -> None:
    pod = wire.pod()
    streams = [pod.open(client=wire.attached(pod)) for _ in range(4)]
    agent = Agent(pod)
    for stream in streams:
        stream.send(b"x" * 2_000)
    while len({base for _, base, _ in agent.markers}) < 4:
        agent.read()  # all of them get that far without a single echo
    other = pod.open(client=wire.attached(pod))
    probe(agent, other)


@pytest.mark.parametrize("size", [1, 100, 400, 512, 513, 8_180])
def test_everything_arrives_in_order_whatever_the_frames(wire: Wire, size: int) -> None:
    pod = wire.pod()
    stream = pod.open()
    data = random.Random(size).randbytes(20_000 if size > 1 else 2_000)
    agent = Agent(pod)

    def send() -> None:
        for start in range(0, len(data), size):
            stream.send(data[start : start + size])
        stream.send()

    with in_background(send):
        while not agent.ended:
            agent.read()
            if agent.markers:
                agent.echo()
    assert agent.taken[1] == data


def test_end_of_file_waits_for_the_data_before_it(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    agent = Agent(pod)
    stream.send(b"x" * 1_000)
    stream.send()
    agent.read_marker()
    agent.echo()
    while not agent.ended:
        assert not agent.markers
        agent.read()
        if agent.markers:
            agent.echo()
    assert len(agent.taken[1]) == 1_000


def test_agent_that_is_slow_to_echo_holds_the_data_back_not_the_commands(wire: Wire) -> None:
    pod = wire.pod()
    stream = pod.open()
    agent = Agent(pod)
    stream.send(b"x" * 5_000)
    agent.read_marker()
    assert pod.pings()
    pod.vm.send_frame(1, b"out")
    assert stream.read_frame() == (1, b"out")


def test_client_that_goes_while_its_stdin_waits_leaves_the_others_alone(wire: Wire) -> None:
    """Whether the rest of it is still sent is open."""
    pod = wire.pod()
    gone, stays = pod.open(client=wire.attached(pod)), pod.open(client=wire.attached(pod))
    agent = Agent(pod)
    gone.send(b"x" * 5_000)
    agent.read_marker()
    gone.close()
    probe(agent, stays)
    agent.echo()
    stays.send(b"here")
    while (taken := agent.read()).seq != stays.base:
        if agent.markers:
            agent.echo()
    assert taken.payload == b"here"


def test_client_that_sends_without_end_is_held_back(wire: Wire) -> None:
    pod = wire.pod()
    stream, other = pod.open(), pod.open(client=wire.attached(pod))
    agent = Agent(pod)
    before = wire.daemon.resident_bytes()
    stream.sock.setblocking(False)
    rest = memoryview(frame(1, b"x" * 8_000) * 2_000)
    with suppress(BlockingIOError):
        while rest:
            rest = rest[stream.sock.send(rest) :]
    assert rest
    agent.read_marker()
    probe(agent, other)
    with suppress(BlockingIOError):
        while rest:
            rest = rest[stream.sock.send(rest) :]
    assert rest
    assert wire.daemon.resident_bytes() - before < 4_000_000


def test_agent_that_lost_the_echo_is_asked_again(hasty: Wire) -> None:
    pod = hasty.pod()
    stream = pod.open()
    agent = Agent(pod)
    stream.send(b"x" * 1_000)
    agent.read_marker()
    agent.markers.clear()  # dropped: its output buffer was full
    agent.read_marker()  # once more
    assert len(agent.taken[1]) <= WINDOW
    agent.echo()
    while len(agent.taken[1]) < 1_000:
        agent.read()
        if agent.markers:
            agent.echo()


@contextmanager
def acknowledging(pod: Pod) -> Iterator[None]:
    """The agent acknowledges what it is asked meanwhile."""
    over = threading.Event()

    def acknowledge() -> None:
        while not over.wait(0.001):
            if not is_silent(pod.vm.ctl):
                pod.vm.acknowledge()

    with in_background(acknowledge):
        try:
            yield
        finally:
            over.set()


def test_stdin_arrives_though_its_agent_loses_each_echo(hasty: Wire) -> None:
    """It floods, and its output buffer is full; and a client's command is answered meanwhile."""
    pod = hasty.pod()
    flooding, stream = pod.open(), pod.open()
    data = random.Random(5).randbytes(50_000)
    taken = bytearray()
    with acknowledging(pod), in_background(lambda: stream.send(data)):
        while len(taken) < len(data):
            pod.vm.send_frame(flooding.base, b"x")
            assert flooding.read_frame().payload == b"x"
            seq, payload = pod.vm.read_frame()
            assert seq == stream.base or seq >= MARKER
            taken += payload
        assert pod.client.ask("hyper", {"hyperName": "getpod"}) == OK
    assert taken == data


def test_agent_that_never_echoes_is_paced_by_commands(hasty: Wire) -> None:
    pod = hasty.pod()
    stream = pod.open()
    data = random.Random(4).randbytes(6_000)
    stream.send(data)
    taken = bytearray()
    with acknowledging(pod):
        while len(taken) < len(data):
            seq, payload = pod.vm.read_frame()
            assert seq in {1} or seq >= MARKER
            taken += payload
    assert taken == data


@pytest.fixture
def restless(tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon that asks an agent again at once."""
    tables = PATIENT.replace("echo_timeout = 60", "echo_timeout = 0.001")
    with own_daemon(tmp_sock_dir, tables, check=True) as wire:
        yield wire


def test_agent_that_is_asked_again_and_again_while_it_is_busy_is_sent_stdin_paced(restless: Wire) -> None:
    pod = restless.pod()
    stream = pod.open()
    agent = Agent(pod)
    data = random.Random(6).randbytes(3_000)
    stream.send(data)
    for _ in range(50):
        agent.read_marker()
    assert len(agent.taken[stream.base]) <= WINDOW
    with acknowledging(pod):
        while len(agent.taken[stream.base]) < len(data):
            while len(agent.markers) > 1:
                agent.markers.popleft()
            agent.echo()
            agent.read_marker()
    assert agent.taken[stream.base] == data


def test_window_of_0_turns_it_off(unpaced: Wire) -> None:
    pod = unpaced.pod()
    stream = pod.open()
    for _ in range(10):
        stream.send(b"x" * 4_084)
    taken = 0
    while taken < 40_840:
        seq, payload = pod.vm.read_frame()
        assert seq == 1
        taken += len(payload)
    stream.send()
    assert pod.vm.read_frame() == (1, b"")
