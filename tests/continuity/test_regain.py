"""What a channel goes on with whose process was killed, step by step: nobody drives the old one any more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.api.frames import encode_frame
from cc_proxy.continuity.cells import BUSY, READING, SESSION_WORDS, VM_TORN, VM_WORDS, Cell
from cc_proxy.continuity.memory import BUFFER_SIZE, Memory, shared_memory
from cc_proxy.continuity.regain import ChannelFacts, Gap, Regained, SessionFacts, regain
from cc_proxy.continuity.state.streams import ChannelState
from cc_proxy.hyperstart.pacing import FIRST_MARKER, LOSSLESS, StdinWindow
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.streams.channel import Channel
from cc_proxy.proxy.streams.interfaces import Pacing, Place, Sockets
from cc_proxy.proxy.streams.mailbox import Mailbox
from cc_proxy.proxy.streams.session import Session, Whose
from cc_proxy.proxy.streams.spool import Spool
from tests.proxy.streams.killed import Owner, Quiet
from tests.proxy.support import NEVER, frames_of, pair, read_now, spool_space
from tests.wire.support import Frame, wait_until

#: The VM's socket buffer, and the one of a client that does not read: just enough for what is sent at once.
SMALL = 4_608
ENOUGH = 40_000


def new_cell(words: int) -> Cell:
    return memoryview(bytearray(8 * words)).cast("Q")


class Life:
    """The channel of one process, with memory that outlives it."""

    def __init__(self, world: World) -> None:
        fd = os.memfd_create("buffers")
        os.ftruncate(fd, 2 * BUFFER_SIZE)
        self.memory: Memory = shared_memory(fd, new_cell(VM_WORDS))
        os.close(fd)
        self.cells: dict[int, Cell] = {}
        self._world = world
        self.mailbox = Mailbox()
        self._control = Quiet()
        io = socket.socket(fileno=os.dup(world.io.fileno()))
        sockets = Sockets(io, self._control, None)
        pacing = Pacing(NEVER, lambda _pings, _done: None)
        self.channel = Channel(Owner(), sockets, self.memory, self.mailbox, pacing)

    def session(self, seq: int, fd: int, window: StdinWindow | None) -> Session:
        self.cells[seq] = new_cell(SESSION_WORDS)
        sock = socket.socket(fileno=os.dup(fd))
        spool = Spool(self._world.space, 0)
        place = Place(lambda: None, self.cells[seq])
        return Session(range(seq, seq + 2), sock, Whose("vm", 0, 0), spool, window, place)

    def turn(self) -> None:
        for _ in range(4):
            self.mailbox.post(lambda: None)
            self.channel.serve(self.channel.wait())

    def close(self, *, handed_over: bool = False) -> None:
        if not handed_over:
            self.channel.close()
        self.mailbox.close()
        self._control.close()


class World:
    """A VM and clients, and who drives the channel between them."""

    def __init__(self, directory: Path, window: int, io_buffer: int | None) -> None:
        self.space = spool_space(directory)
        self.window = window
        self.io, self.vm = pair(io_buffer)
        self.ends: dict[int, socket.socket] = {}
        self.clients: dict[int, socket.socket] = {}
        self.lives = [Life(self)]

    @property
    def life(self) -> Life:
        return self.lives[-1]

    def open(self, buffer: int | None = None) -> int:
        seq = 1 + 2 * len(self.clients)
        self.ends[seq], self.clients[seq] = pair(buffer)
        window = StdinWindow(seq, self.window) if self.window else None
        self.life.channel.add(self.life.session(seq, self.ends[seq].fileno(), window))
        self.life.channel.open_stdin([seq])
        return seq

    def kill(self) -> Regained:
        """Another process takes over."""
        sessions = [
            SessionFacts(Fd(end.fileno()), seq, 2, 0, 0, self.life.cells[seq])
            for seq, end in self.ends.items()
            if seq in self.life.cells
        ]
        next_seq = 1 + 2 * len(self.clients)
        facts = ChannelFacts(Fd(self.io.fileno()), self.life.memory, sessions, next_seq, self.window)
        found = regain(facts)
        self._go_on(found.state)
        return found

    def hand_over(self) -> None:
        """Another process takes over as planned."""
        before = self.lives.pop()
        state = before.channel.hand_over()
        before.close(handed_over=True)
        self._go_on(state)
        assert state.io
        for fd in (state.io, *(session.fd for session in state.streams.sessions)):
            os.close(fd.number)  # those who took over have their own

    def _go_on(self, before: ChannelState) -> None:
        self.lives.append(Life(self))
        restored = []
        for state in before.streams.sessions:
            window = StdinWindow.from_state(state.first_seq, state.window) if state.window else None
            restored.append(self.life.session(state.first_seq, state.fd.number, window))
            restored[-1].restore(state)
        self.life.channel.restore(before, restored)

    def say(self, *frames: bytes) -> None:
        self.vm.sendall(b"".join(frames))
        self.life.turn()

    def spools(self) -> bool:
        self.life.turn()
        return self.space.used > 0

    def heard(self, seq: int) -> list[Frame]:
        """What a client has got."""
        self.life.turn()
        return frames_of(read_now(self.clients[seq]))

    def send(self, seq: int, data: bytes) -> None:
        self.clients[seq].sendall(data)
        self.life.turn()

    def got(self) -> list[Frame]:
        """What the VM has got."""
        self.life.turn()
        data = read_now(self.vm)
        self.life.turn()
        return frames_of(data + read_now(self.vm))

    def fill(self) -> int:
        """Make the VM's socket full; returns how much is in it."""
        self.io.setblocking(False)
        filled = 0
        try:
            while True:
                filled += self.io.send(encode_frame(99, bytes(100)))
        except BlockingIOError:
            return filled

    def close(self) -> None:
        for life in self.lives:
            life.close()
        self.lives.clear()  # a mapping has an fd
        for end in (self.io, self.vm, *self.ends.values(), *self.clients.values()):
            end.close()


@pytest.fixture(params=[0])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(tmp_path, request.param, SMALL)
        stack.callback(world.close)
        yield world


paced = pytest.mark.parametrize("world", [512], indirect=True)


def test_at_rest_nothing_is_missing(world: World) -> None:
    seq = world.open()
    world.say(encode_frame(seq, b"before"))
    world.send(seq, encode_frame(seq, b"stdin"))
    assert world.heard(seq) == [Frame(seq, b"before")]
    assert world.got() == [Frame(seq, b"stdin")]
    found = world.kill()
    assert (found.gaps, found.hung_up, found.lost) == ([], [], "")
    world.say(encode_frame(seq + 1, b"behind"))
    world.send(seq, encode_frame(seq, b"more"))
    assert world.heard(seq) == [Frame(seq + 1, b"behind")]
    assert world.got() == [Frame(seq, b"more")]


def test_an_unfinished_frame_is_finished(world: World) -> None:
    seq = world.open()
    whole = encode_frame(seq, b"in two parts")
    world.say(whole[:15])
    assert world.kill().gaps == []
    world.say(whole[15:])
    assert world.heard(seq) == [Frame(seq, b"in two parts")]


def test_stream_that_nobody_was_sent_a_command_for_is_still_silent(world: World) -> None:
    """An empty frame of the agent's is no end of file then."""
    seq = world.open()
    other = 1 + 2 * len(world.clients)
    world.ends[other], world.clients[other] = pair()
    world.life.channel.add(world.life.session(other, world.ends[other].fileno(), None))
    world.kill()
    world.say(encode_frame(other), encode_frame(seq))
    assert world.heard(other) == []
    assert world.heard(seq) == [Frame(seq, b"")]


def test_output_that_waits_for_a_client_is_a_gap(world: World) -> None:
    slow, other = world.open(ENOUGH), world.open()
    frames = [encode_frame(slow, bytes([number]) * 1_000) for number in range(200)]
    world.vm.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    world.say(*frames, encode_frame(other, b"x"))
    found = world.kill()
    assert found.gaps == [Gap(to_vm=False, streams=[slow, other], most=200 * 1_012 + 13)]
    assert not found.hung_up
    before = world.heard(slow)
    assert 0 < len(before) < 200
    assert before == [Frame(slow, bytes([number]) * 1_000) for number in range(len(before))]
    world.say(encode_frame(slow, b"goes on"))
    assert world.heard(slow) == [Frame(slow, b"goes on")]
    assert world.heard(other) == [Frame(other, b"x")]


def test_the_end_of_a_process_is_passed_on_though_it_was_in_a_gap(world: World) -> None:
    """A client that had it gets it once more, but no output."""
    slow, other = world.open(ENOUGH), world.open()
    world.vm.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    output = [encode_frame(slow, bytes(1_000)) for _ in range(200)]
    end = [Frame(slow, b""), Frame(slow, b"\x07")]
    world.say(
        encode_frame(slow + 1),
        *output,
        *(encode_frame(*frame) for frame in end),
        encode_frame(other, b"x"),
        encode_frame(other),
    )
    found = world.kill()
    assert [gap.streams for gap in found.gaps] == [[slow, other]]
    heard = world.heard(slow)
    assert len(heard) < len(output)
    assert (heard + world.heard(slow))[-2:] == end
    world.say(encode_frame(other, b"\x08"))
    eof = Frame(other, b"")
    assert world.heard(other) == [Frame(other, b"x"), eof, eof, Frame(other, b"\x08")]
    assert world.kill().gaps == []


def test_an_empty_frame_before_there_is_a_process_is_no_end(world: World) -> None:
    seq, slow = world.open(), world.open(ENOUGH)
    silent = 1 + 2 * len(world.clients)
    world.ends[silent], world.clients[silent] = pair()
    world.life.channel.add(world.life.session(silent, world.ends[silent].fileno(), None))
    world.vm.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    world.say(*[encode_frame(slow, bytes(1_000))] * 200, encode_frame(silent), encode_frame(seq, b"x"))
    assert world.kill().gaps
    assert world.heard(silent) == []
    assert world.heard(seq) == [Frame(seq, b"x")]


@pytest.mark.parametrize("drained", [False, True])
def test_what_is_in_the_spool_is_a_gap_and_who_is_in_the_middle_of_it_is_hung_up(
    world: World, drained: bool
) -> None:
    slow = world.open(ENOUGH)
    world.vm.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    world.say(*[encode_frame(slow, bytes(1_000))] * 200)
    wait_until(world.spools, "its patience is over")
    for _ in range(8):
        world.say(*[encode_frame(slow, bytes(1_000))] * 200)
    if drained:
        world.clients[slow].recv(100_000)
        world.life.turn()
        assert world.spools()
    found = world.kill()
    if drained:
        assert [hung_up.session.first_seq for hung_up in found.hung_up] == [slow]
        assert not found.state.streams.sessions
    else:
        assert not found.hung_up
        assert [gap.streams for gap in found.gaps] == [[slow]]
        assert found.gaps[0].most >= 1_600_000
        read_now(world.clients[slow])
        world.say(encode_frame(slow, b"goes on"))
        assert world.heard(slow) == [Frame(slow, b"goes on")]


def test_stdin_that_the_vm_did_not_take_is_a_gap_and_framing_is_right(world: World) -> None:
    seq = world.open()
    filled = world.fill()
    whole = encode_frame(seq, b"x" * 5_000)
    world.send(seq, whole[:3_000])
    found = world.kill()
    assert found.gaps == [Gap(to_vm=True, streams=[seq], most=3_000)]
    world.send(seq, whole[3_000:])
    got = [frame for frame in world.got() if frame.seq == seq]
    assert b"".join(frame.payload for frame in got) == b"x" * 2_012
    assert filled


@pytest.mark.parametrize("by_frame", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_stdin_that_was_handed_over_and_not_taken_by_then_is_a_gap_too(
    world: World, times: int, by_frame: bool
) -> None:
    seq, other = world.open(), world.open()
    world.fill()
    world.send(seq, encode_frame(seq, b"x" * 100) + (encode_frame(seq) if by_frame else b""))
    if not by_frame:
        world.clients[seq].shutdown(socket.SHUT_WR)
    for _ in range(times):
        world.hand_over()
        world.life.turn()
    [gap] = world.kill().gaps
    assert (gap.to_vm, gap.streams) == (True, [seq])
    assert 112 <= gap.most <= 124
    assert world.kill().gaps == []
    world.send(other, encode_frame(other, b"goes on"))
    got = [*world.got(), *world.got()]
    assert [frame for frame in got if frame.seq in (seq, other)] == [
        Frame(seq, b""),
        Frame(other, b"goes on"),
    ]


@pytest.mark.parametrize("by_frame", [False, True])
def test_end_of_file_that_the_vm_did_not_take_is_said_again(world: World, by_frame: bool) -> None:
    seq = world.open()
    world.send(seq, encode_frame(seq, b"first"))
    assert world.got() == [Frame(seq, b"first")]
    world.fill()
    if by_frame:
        world.send(seq, encode_frame(seq, b"last") + encode_frame(seq))
    else:
        world.clients[seq].shutdown(socket.SHUT_WR)
        world.life.turn()
    world.kill()
    got = [*world.got(), *world.got()]
    assert [frame for frame in got if frame.seq == seq] == [Frame(seq, b"")]


def test_header_of_which_a_part_was_read(world: World) -> None:
    seq = world.open()
    whole = encode_frame(seq, b"stdin")
    for cut in range(1, 12):
        world.send(seq, whole[:cut])
        assert world.kill().gaps == []
        world.send(seq, whole[cut:])
        assert world.got() == [Frame(seq, b"stdin")]


def test_header_of_somebody_else_of_which_a_part_was_read_ends_the_session(world: World) -> None:
    seq = world.open()
    world.send(seq, encode_frame(seq + 2, b"stdin")[:9])
    world.kill()
    world.send(seq, encode_frame(seq + 2, b"stdin")[9:])
    assert world.got() == []
    assert world.clients[seq].recv(1) == b""


@paced
def test_a_new_marker_opens_the_window_and_no_copy_of_an_old_one(world: World) -> None:
    seq = world.open()
    world.send(seq, encode_frame(seq, bytes(400)))
    _, marker = world.got()
    assert marker.seq >= FIRST_MARKER
    world.kill()
    (another,) = world.got()
    assert another.seq >= FIRST_MARKER
    assert another.seq != marker.seq
    world.send(seq, encode_frame(seq, b"more"))
    world.say(encode_frame(marker.seq))
    assert world.got() == []
    world.say(encode_frame(another.seq))
    assert world.got() == [Frame(seq, b"more")]


@paced
def test_lossless_agent_is_still_known_as_one(world: World) -> None:
    world.open()
    world.say(encode_frame(FIRST_MARKER, LOSSLESS))
    assert world.kill().state.streams.pacer.lossless
    assert world.kill().state.streams.pacer.lossless


def test_vm_that_may_have_a_part_of_a_frame_is_lost(world: World) -> None:
    world.life.memory.cell[VM_TORN] = 1
    assert "a part of a frame" in world.kill().lost


def test_while_it_is_not_known_how_much_was_read_nothing_is_delivered(world: World) -> None:
    """Killed in the middle of reading, and once more while frames are looked for."""
    seq = world.open()
    world.vm.sendall(encode_frame(seq, b"is lost"))
    assert world.io.recv(15)
    world.life.memory.cell[READING] |= BUSY
    for _ in range(2):
        found = world.kill()
        assert [gap.streams for gap in found.gaps] == [[]]
        assert found.state.streams.resync
        world.say(encode_frame(seq, b"looks like one"))
        assert world.heard(seq) == []
    probes = [frame for frame in world.got() if frame.seq >= FIRST_MARKER]
    assert len(probes) == 2
    world.say(encode_frame(probes[-1].seq), encode_frame(seq, b"behind"))
    assert world.heard(seq) == [Frame(seq, b"behind")]
    assert world.kill().gaps == []
    world.say(encode_frame(seq, b"at once"))
    assert world.heard(seq) == [Frame(seq, b"at once")]


@paced
def test_markers_are_not_missed_while_frames_are_looked_for(world: World) -> None:
    """An agent sends everything back in the order in which it came."""
    seq = world.open()
    world.send(seq, encode_frame(seq, bytes(400)))
    assert len(world.got()) == 2
    world.life.memory.cell[READING] |= BUSY
    assert world.kill().state.streams.resync
    world.say(*[encode_frame(frame.seq) for frame in world.got()])
    world.send(seq, encode_frame(seq, b"goes on"))
    assert world.got() == [Frame(seq, b"goes on")]
