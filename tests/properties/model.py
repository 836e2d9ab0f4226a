"""VMs, clients and sessions as a model has them, each with the real sockets it speaks through.

Whatever goes over a socket is noted here as what has to come out at the other end. Only what is certain
to end is waited for, so that an order of events that the daemon is free to choose never matters.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field

from tests.wire.support import (
    ACK,
    FRAME,
    MARKER,
    OK,
    PING,
    WAIT,
    Command,
    FakeVm,
    RawClient,
    Stream,
    command,
    error_of,
    frame,
)

#: What hyperstart keeps of a process's stdin.
WINDOW = 512
_SCRATCH = 256 * 1024


@dataclass
class Said:
    """A process's stdin: its bytes, and after how many of them end of file was said."""

    data: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)

    @property
    def at_end(self) -> bool:
        return self.ends[-1:] == [len(self.data)]

    def end(self) -> None:
        self.ends.append(len(self.data))

    def begins_with(self, other: Said) -> bool:
        return self.data.startswith(other.data) and self.ends[: len(other.ends)] == other.ends


def never_wait_long(sock: socket.socket) -> None:
    """WAIT is the kernel's to keep: a Python socket with a timeout waits even with MSG_DONTWAIT."""
    sock.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(WAIT), 0))


class Session:
    """The client's end of an fd that allocateIO gave out."""

    def __init__(self, vm: Vm, stream: Stream, streams: int) -> None:
        never_wait_long(stream.sock)
        self.vm = vm
        self.stream = stream
        self.seqs = range(stream.base, stream.base + streams)
        self.expected = bytearray()  # all output so far, and how much of it has come
        self.received = 0
        self.queue = bytearray()  # frames that the client has yet to send
        self.said = Said()
        self.got = Said()  # by the agent
        self.held = 0  # by the agent, since it last sent a marker back
        self.started = False  # its process: nothing reaches the agent before
        self.may_end = False  # whether the agent is told of an end depends on who is quicker
        self.half_closed = self.closed = self.broken = False
        self.done = (
            False  # nothing is done with it any more; unlike the others, this is never up to the daemon
        )
        self._header = b""
        self._missing = 0

    @property
    def over(self) -> bool:
        """Nothing more can be sent."""
        return self.closed or self.half_closed or self.broken or not self.vm.alive

    @property
    def settled(self) -> bool:
        if self.started and self.queue and not self.over:
            return False
        if self.started and self.vm.alive and not self._all_got():
            return False
        return self.closed or self.broken or self.received == len(self.expected)

    def _all_got(self) -> bool:
        return self.got == self.said or (self.may_end and self.got == Said(self.said.data, [0]))

    # Client ---------------------------------------------------------------------------------------------

    def push(self, size: int) -> None:
        """Send of what is queued what the socket takes now, and not more than this."""
        if self.over:
            return
        try:
            sent = self.stream.sock.send(self.queue[:size], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._note(bytes(self.queue[:sent]))
        del self.queue[:sent]

    def _note(self, sent: bytes) -> None:
        while sent and not self.broken:
            room = self._missing or FRAME.size - len(self._header)
            piece, sent = sent[:room], sent[room:]
            if self._missing:
                self.said.data += piece
                self._missing -= len(piece)
                continue
            self._header += piece
            if len(self._header) == FRAME.size:
                seq, length = FRAME.unpack(self._header)
                self._header, self._missing = b"", length - FRAME.size
                self.broken = seq != self.seqs.start or length < FRAME.size
                if length == FRAME.size and not self.broken:
                    self.said.end()

    def half_close(self) -> None:
        if self.over:
            return
        self.half_closed = True
        self.stream.sock.shutdown(socket.SHUT_WR)
        if not self.said.at_end:
            self.said.end()

    def close(self) -> None:
        """One that has sent something ends; one that has only half closed may be too quick to be noticed."""
        if self.closed:
            return
        if self.half_closed and not self.said.data and self.got != self.said:
            self.said.ends, self.may_end = [], True
        elif not self.over and self.said.data and not self.said.at_end:
            self.said.end()
        self.closed = True
        self.stream.close()

    def read(self, size: int = _SCRATCH) -> None:
        """Take what has come, at most so much; it has to be the next of what is expected."""
        while size and not self.closed and self.received < len(self.expected):
            try:
                piece = self.stream.sock.recv(min(size, _SCRATCH), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                assert self.broken
                piece = b""
            if not piece:
                assert self.broken, f"{len(self.expected) - self.received} bytes never came"
                self.close()
                return
            assert piece == self.expected[self.received : self.received + len(piece)]
            self.received += len(piece)
            size -= len(piece)

    def read_to_end(self) -> None:
        """All the rest, and then the end: the VM is gone."""
        while not self.closed and self.received < len(self.expected):
            assert select.select([self.stream.sock], [], [], WAIT)[0], "output never came"
            self.read()
        if not self.closed:
            assert self.stream.at_end()
            self.close()
        self.done = True


class Vm:
    """A VM that is up, with an agent that handles what it is sent when the test says so."""

    def __init__(
        self, container: str, fake: FakeVm, witness: RawClient, *, paced: bool, may_pause: bool, booted: bool
    ) -> None:
        never_wait_long(fake.io)
        self.container = container
        self.fake = fake
        self.witness = witness  # a connection that is attached to it as long as it lives
        self.paced = paced
        self.may_pause = may_pause  # while the spool is full the daemon does not see what it says
        self.alive = True
        self.echoes = True  # whether markers come back
        self.next_seq = 1 if booted else 0  # 0: to be seen with the first session
        self.sessions: list[Session] = []
        self.late: list[int] = []  # codes of the answers it has yet to give, all of them too late
        self.markers: list[int] = []  # that it has yet to send back
        self._out = bytearray()  # output that it has yet to send
        self._frames: list[tuple[int, Session | None, bytes]] = []  # and where each frame of it ends
        self._queued = self._sent = 0
        self._in = bytearray()

    @property
    def blocked(self) -> bool:
        """Whether there is output that it has yet to send."""
        return bool(self._out)

    @property
    def settled(self) -> bool:
        return not self.alive or not (self._out or self.markers or self._in)

    # Output ---------------------------------------------------------------------------------------------

    def queue(self, seq: int, payload: bytes = b"") -> None:
        whole = frame(seq, payload)
        self._out += whole
        self._queued += len(whole)
        owner = next((session for session in self.sessions if seq in session.seqs), None)
        self._frames.append((self._queued, owner, whole))

    def flush(self, size: int = 1 << 40) -> None:
        """Send so much of what is queued, or what is taken. Whole frames, once sent, have to arrive."""
        sent = 0
        with suppress(BlockingIOError):
            while piece := self._out[sent:size][:_SCRATCH]:
                sent += self.fake.io.send(piece, socket.MSG_DONTWAIT)
        del self._out[:sent]
        self._sent += sent
        while self._frames and self._frames[0][0] <= self._sent:
            _, owner, whole = self._frames.pop(0)
            if owner:
                self._deliver(owner, whole)

    def _deliver(self, owner: Session, whole: bytes) -> None:
        """Output on its stdio says that a process has been started; an empty frame is no such thing."""
        seq, length = FRAME.unpack_from(whole)
        if seq == owner.seqs.start and not owner.started:
            if length == FRAME.size:
                return  # nobody's
            owner.started = True
        if not owner.closed:
            owner.expected += whole

    def flood(self) -> None:
        """Send what is queued until all is sent, or the daemon says that the spool takes no more of it."""
        deadline = time.monotonic() + WAIT
        self.flush()
        while self.blocked and not self._spool_is_full():
            assert time.monotonic() < deadline, "the daemon neither reads nor says so"
            self.flush()

    def _spool_is_full(self) -> bool:
        """Or that of one that had the same id and whose clients have yet to read: `status` tells no more."""
        vms = json.loads(self.witness.ask("status"))["data"]["vms"]
        streams = [vm["streams"] for vm in vms if vm["id"] == self.container and vm["streams"]]
        return any(stream["reason"] for each in streams for stream in each["waiting"])

    # Stdin ----------------------------------------------------------------------------------------------

    def start(self, session: Session) -> None:
        """A process is started on its streams."""
        process = {"stdio": session.seqs.start, "stderr": session.seqs.stop - 1}
        self.witness.hyper("execcmd", json.dumps({"container": self.container, "process": process}))
        self.read_command()
        self.fake.ctl.sendall(b"".join(map(command, [*self.late, ACK])))
        self.late = []
        assert self.witness.receive() == OK
        session.started = True

    def handle(self) -> bool:
        """Take what has arrived; False if that is the end."""
        try:
            while data := self.fake.io.recv(_SCRATCH, socket.MSG_DONTWAIT):
                self._in += data
                self._take_frames()
        except BlockingIOError:
            return True
        return False

    def _take_frames(self) -> None:
        while len(self._in) >= FRAME.size:
            seq, length = FRAME.unpack_from(self._in)
            assert FRAME.size <= length <= 4096, "the agent would not survive that"
            if len(self._in) < length:
                return
            self._take(seq, bytes(self._in[FRAME.size : length]))
            del self._in[:length]

    def _take(self, seq: int, payload: bytes) -> None:
        if seq >= MARKER:
            assert self.paced
            assert not payload
            self.markers.append(seq)
            return
        (session,) = (session for session in self.sessions if session.seqs.start == seq)
        assert session.started, "no process owns it: the agent would throw it away"
        if payload:
            session.got.data += payload
            session.held += len(payload)
            assert session.held <= WINDOW or not self.paced, "the agent would have lost some"
        else:
            session.got.end()
        assert session.said.begins_with(session.got) or session.may_end

    def echo(self, count: int = 1 << 40) -> None:
        """Send markers back, the oldest first; or lose them, as if there were no room for them."""
        if not self.echoes:
            self.markers = []
        for seq in self.markers[:count]:
            for session in self.sessions:
                if session.seqs.start == seq & (1 << 53) - 1:
                    session.held = 0
            self.queue(seq)
        del self.markers[:count]

    # Commands -------------------------------------------------------------------------------------------

    def read_command(self) -> Command:
        """A client's. The daemon's own pings before it are answered."""
        while (taken := self.fake.read_command()) == Command(PING, b""):
            self._acknowledge_ping()
        return taken

    def answer_pings(self) -> None:
        """The daemon asks whether stdin is handled, on a channel on which nobody else asks anything now."""
        while select.select([self.fake.ctl], [], [], 0)[0]:
            assert self.fake.read_command() == Command(PING, b"")
            self._acknowledge_ping()

    def _acknowledge_ping(self) -> None:
        """Everything that was taken in by now is handled."""
        for session in self.sessions:
            session.held = 0
        self.fake.ctl.sendall(b"".join(map(command, [*self.late, ACK])))
        self.late = []

    def answer_who_asks_anew(self) -> None:
        """The daemon does not know which commands have no answer yet."""
        self.fake.ctl.sendall(b"".join(map(command, self.late)))
        self.late = []
        self.fake.answer_questions()

    # The end --------------------------------------------------------------------------------------------

    def die(self, how: str) -> None:
        """By a channel or both, or by what no agent says. Returns when the daemon has noticed."""
        self.alive = False
        if how == "bad frame":
            self._out += frame(1, b"", length=5)
            self.flush()
        if how == "bad message" or (how == "bad frame" and (self.blocked or self.may_pause)):
            with suppress(BrokenPipeError):  # it has seen the frame
                self.fake.ctl.sendall(bytes(8))
        if how in {"io", "both"}:
            self.fake.io.close()
        if how in {"ctl", "both"}:
            self.fake.ctl.close()
        if how == "both":
            self.witness.hyper("ping")
            assert error_of(self.witness.receive()).startswith("VM gone: ")
        if how in {"bad frame", "bad message", "ctl"}:
            while self.handle():
                assert select.select([self.fake.io], [], [], WAIT)[0], "the daemon does not hang up"
        if how in {"bad frame", "bad message", "io"}:
            with suppress(ConnectionResetError):  # it has not even read the message
                while self.fake.ctl.recv(_SCRATCH):
                    pass  # its pings

    def close(self) -> None:
        self.witness.close_all()
        self.fake.close()


@dataclass
class Client:
    """A connection, and what it is attached to."""

    raw: RawClient
    vm: Vm | None = None


def settle(vms: list[Vm], sessions: list[Session]) -> None:
    """Everybody does their part until all that was sent has arrived."""
    deadline = time.monotonic() + WAIT
    while True:
        for vm in (vm for vm in vms if vm.alive):
            vm.echo()
            vm.flush()
            assert vm.handle(), "the daemon hung up"
            vm.answer_pings()
        for session in sessions:
            session.push(_SCRATCH)
            session.read()
        if all(vm.settled for vm in vms) and all(session.settled for session in sessions):
            return
        assert time.monotonic() < deadline, "not all has arrived"
        _wait_for_something(vms, sessions, deadline - time.monotonic())


def _wait_for_something(vms: list[Vm], sessions: list[Session], seconds: float) -> None:
    reading = [channel for vm in vms if vm.alive for channel in (vm.fake.io, vm.fake.ctl)]
    reading += [session.stream.sock for session in sessions if not session.closed]
    sending = [session for session in sessions if session.queue and session.started and not session.over]
    writing = [session.stream.sock for session in sending]
    writing += [vm.fake.io for vm in vms if vm.alive and vm.blocked]
    if not any(vm.markers for vm in vms if vm.alive):
        select.select(reading, writing, [], seconds)


def close_all(vms: list[Vm], clients: list[Client]) -> None:
    """Whatever happened before."""
    for vm in vms:
        with suppress(OSError):
            vm.close()
        for session in vm.sessions:
            session.stream.close()
    for client in clients:
        client.raw.close_all()
