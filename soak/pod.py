"""One VM and its clients, from hello to the VM's end."""

import contextlib
import random
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable
from enum import Enum, auto

import msgspec

from bench.streams import FIRST_MARKER, MAX_TO_AGENT, WrongBytesError
from bench.vms import READY
from cc_proxy.api import AllocateIo, Attach, Bye, Hello, Hyper, Payload
from cc_proxy.api.fdpassing import read_fd
from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.hyperstart.codes import Code
from soak.control import Control
from soak.habits import HABITS, lifetime
from soak.session import Chunk, Session
from soak.sockets import PATIENCE, Connection, VmSockets

#: While this many bytes wait for the VM's socket, its processes write nothing.
_OUTBOX = 256 * 1024
_MOST_SESSIONS = 6
_MOST_PIECES = 64
_READ_SIZE = 256 * 1024
_STAYS = 25.0


class _State(Enum):
    LIVES = auto()
    SETTLES = auto()  # nothing new begins, and everything that was sent must arrive
    DEAD = auto()  # the VM has gone; its clients read what is left


class Pod:
    """A VM and all of its clients, played by one object."""

    def __init__(
        self, directory: str, proxy: str, name: str, number: int, dice: random.Random, done: Counter[str]
    ) -> None:
        self._proxy = proxy
        self._directory = directory
        self._number = number
        self._dice = dice
        self._done = done
        self._container = f"{name}-{number}"
        self._state = _State.LIVES
        self._ends_at = time.monotonic() + lifetime(dice, _STAYS)
        self._settle_until = 0.0
        self._said_bye = False
        self._sessions: list[Session] = []
        self._by_seq: dict[int, Session] = {}  # including those that are over: their stdin may still end
        self._outbox: deque[Chunk] = deque()
        self._outbox_size = self._partly_sent = 0
        self._inbox = bytearray()
        self._connections = [Connection(proxy)]
        control, self._io = self._boot()
        self._control = Control(control, self._container)
        self._attach()

    @property
    def over(self) -> bool:
        return self._state is _State.DEAD and not self._sessions

    def _boot(self) -> list[socket.socket]:
        sockets = VmSockets(self._directory, str(self._number))
        try:
            self._connections[0].send(sockets.hello(self._container))
            channels = sockets.accept()
            channels[0].sendall(READY)
            self._connections[0].expect(True, "hello")
        finally:
            sockets.close()
        self._done["VMs"] += 1
        return channels

    # Turns ------------------------------------------------------------------------------------------------

    def turn(self, now: float, seconds: float) -> None:
        """Do what is due. `seconds` have passed since the last turn."""
        if self._state is _State.LIVES:
            self._live(now)
        if self._state is _State.DEAD:
            self._read_clients(now)
            if self.over and not self._said_bye:
                self._say_bye(Connection(self._proxy))
            return
        for session in list(self._sessions):
            session.write(seconds)
            if self._outbox_size < _OUTBOX:
                self._queue(session.output(seconds))
        self.serve()
        self._read_clients(now)
        if self._state is _State.SETTLES:
            self._settle(now)

    def fileno(self) -> int:
        """Return the I/O channel's fd; negative if it is closed."""
        return self._io.fileno()

    def serve(self) -> None:
        """Take what has come on the I/O channel, and send what waits to be sent on it."""
        self._control.answer_daemon()
        if not (self._flush() and self._receive() and self._flush()):
            raise WrongBytesError(f"{self._container}: the daemon has hung up")

    def end(self) -> None:
        """Begin to let everything arrive, after which the VM says bye."""
        if self._state is _State.LIVES:
            self._state = _State.SETTLES
            self._settle_until = time.monotonic() + PATIENCE
            for session in list(self._sessions):
                self._queue(session.end("close" if session.habit.end == "close" else "exit"))

    def close(self) -> None:
        """Close all sockets, in any state."""
        for session in self._sessions:
            session.sock.close()
        self._hang_up()
        for connection in self._connections:
            connection.close()

    def _live(self, now: float) -> None:
        if now > self._ends_at:
            if self._dice.random() < 0.4:
                self.end()
            else:
                self._die()
            return
        for session in list(self._sessions):
            if now > session.ends_at:
                session.ends_at = now + 2 * PATIENCE
                self._queue(session.end(session.habit.end))
        if len(self._sessions) < _MOST_SESSIONS and self._dice.random() < 0.05:
            self._open()
        if self._dice.random() < 0.1:
            self._dice.choice((self._ask, self._ask, self._come_and_go))()

    # The VM -----------------------------------------------------------------------------------------------

    def _queue(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._outbox.append(chunk)
            self._outbox_size += len(chunk.frames)

    def _flush(self) -> bool:
        """Send what the channel takes now; returns whether it is still open."""
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                pieces = [chunk.frames for chunk, _ in zip(self._outbox, range(_MOST_PIECES), strict=False)]
                pieces[0] = memoryview(pieces[0])[self._partly_sent :]
                try:
                    self._note_sent(self._io.sendmsg(pieces, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL))
                except (BrokenPipeError, ConnectionResetError):
                    return False
        return True

    def _note_sent(self, size: int) -> None:
        self._outbox_size -= size
        size += self._partly_sent
        while self._outbox and size >= len(self._outbox[0].frames):
            session, frames, _ = self._outbox.popleft()
            size -= len(frames)
            if session:
                session.sent(len(frames))
        self._partly_sent = size

    def _receive(self) -> bool:
        """Take the stdin that has come; returns whether the channel is still open."""
        with contextlib.suppress(BlockingIOError):
            while data := self._io.recv(_READ_SIZE, socket.MSG_DONTWAIT):
                self._inbox += data
                self._take_frames()
            return False
        return True

    def _take_frames(self) -> None:
        at = 0
        with memoryview(self._inbox) as view:
            while len(view) - at >= FRAME_HEADER.size:
                seq, length = FRAME_HEADER.unpack_from(view, at)
                if not FRAME_HEADER.size <= length <= MAX_TO_AGENT:
                    raise WrongBytesError(
                        f"{self._container}: a frame of {length} bytes, which ends an agent"
                    )
                if length > len(view) - at:
                    break
                with view[at : at + length] as frame:
                    self._take(seq, frame)
                at += length
        del self._inbox[:at]

    def _take(self, seq: int, frame: memoryview) -> None:
        if seq >= FIRST_MARKER:
            self._queue([Chunk(None, bytes(frame), len(frame))])
        elif seq in self._by_seq:
            self._queue(self._by_seq[seq].take_stdin(frame[FRAME_HEADER.size :]))
        else:
            raise WrongBytesError(f"{self._container}: stdin on stream {seq}, which is nobody's")

    def _die(self) -> None:
        """End at once, in the middle of anything. Whole frames that were sent must still arrive."""
        self._done["VMs that died"] += 1
        if self._outbox:
            session, _, frame_size = self._outbox[0]
            if session:
                session.sent(self._partly_sent // frame_size * frame_size)
        if self._dice.random() < 0.3:
            self._control.say_nonsense()
        self._hang_up()

    def _hang_up(self) -> None:
        self._control.close()
        self._io.close()
        for connection in self._connections:
            connection.close()
        self._state = _State.DEAD
        for session in list(self._sessions):
            if session.closed or not session.habit.reads:
                self._forget(session)

    def _settle(self, now: float) -> None:
        sessions = list(self._sessions)
        if not self._outbox and all(session.closed and session.is_settled() for session in sessions):
            self._sessions.clear()
            self._say_bye(self._connections[0])
            self._hang_up()
        elif now > self._settle_until:
            left = [str(one) for one in sessions if not (one.closed and one.is_settled())]
            raise WrongBytesError("; ".join(left))

    # The clients ------------------------------------------------------------------------------------------

    def _read_clients(self, now: float) -> None:
        dead = self._state is _State.DEAD
        for session in list(self._sessions):
            before = session.bytes_passed
            if not session.closed and (session.wants_to_read(now) or self._state is not _State.LIVES):
                session.read(dead)
            self._done["bytes"] += session.bytes_passed - before
            if session.closed and (dead or (self._state is _State.LIVES and session.is_settled())):
                self._forget(session)

    def _forget(self, session: Session) -> None:
        if not session.closed:
            session.close()
        self._sessions.remove(session)

    def _say_bye(self, connection: Connection) -> None:
        """A VM that died has kept its id."""
        self._said_bye = True
        connection.send(Bye(self._container))
        connection.expect(True, "bye")
        connection.close()

    def _attach(self) -> None:
        """Attach a few more clients, as the shims of processes do."""
        for _ in range(3):
            connection = Connection(self._proxy)
            connection.send(Attach(self._container))
            connection.expect(True, "attach")
            self._connections.append(connection)
            self._done["connections"] += 1

    def _open(self) -> None:
        streams = self._dice.choice((1, 2))
        connection = self._dice.choice(self._connections)
        connection.send(AllocateIo(streams))
        answer = connection.expect(True, "allocateIO")
        base = msgspec.json.decode(bytes(answer.data or b""))["ioBase"]
        sock = socket.socket(fileno=read_fd(connection.sock, timeout=PATIENCE))
        connection.send(Hyper("execcmd", msgspec.Raw(b'{"process":{"stdio":%d}}' % base)))
        self._control.carry_out(Code.EXEC_CMD)
        connection.expect(True, "execcmd")
        habit = self._dice.choice(HABITS)
        ends_at = time.monotonic() + lifetime(self._dice, habit.stays)
        seqs = tuple(range(base, base + streams))
        session = Session(self._number, seqs, sock, habit, ends_at)
        self._sessions.append(session)
        self._by_seq |= dict.fromkeys(seqs, session)
        self._done["sessions"] += 1

    def _ask(self) -> None:
        """Send several requests of one client at once, with commands among them; then check the answers."""
        connection = self._dice.choice(self._connections)
        asked = [self._dice.choice(("attach", "ping", "refused")) for _ in range(self._dice.randint(1, 20))]
        payloads: dict[str, Payload] = {
            "attach": Attach(self._container),
            "ping": Hyper("ping", msgspec.Raw(b'{"number":1}')),
            "refused": AllocateIo(3),
        }
        connection.send(*(payloads[name] for name in asked))
        succeeds = [self._answer_command() if name == "ping" else name == "attach" for name in asked]
        for name, success in zip(asked, succeeds, strict=True):
            connection.expect(success, name)
        self._done["requests"] += len(asked)

    def _answer_command(self) -> bool:
        """Acknowledge or refuse a command; returns whether it was acknowledged."""
        success = self._dice.random() < 0.9
        self._control.carry_out(Code.PING, success=success)
        return success

    def _come_and_go(self) -> None:
        """Have a client that connects, does one thing, and goes away."""
        self._done["connections"] += 1
        connection = Connection(self._proxy)
        with contextlib.closing(connection):
            how = self._dice.randrange(5)
            if how == 0:
                connection.sock.sendall(self._dice.choice((b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\1\0\0\0\1x")))
                connection.expect_hang_up()
            elif how == 1:
                connection.sock.sendall(b"\0\0\1\0\0\0\0\0{")
            elif how == 2:
                connection.send(Attach(self._container), AllocateIo(2), AllocateIo(1))
            elif how == 3:
                connection.send(Attach("nobody"))
                connection.expect(False, "attach to nobody")
            else:
                self._hello_fails(connection)

    def _hello_fails(self, connection: Connection) -> None:
        """Say hello in vain: the id is taken, there is no socket, or the VM hangs up."""
        self._done["hellos that failed"] += 1
        how = self._dice.choice(("taken", "no socket", "hangs up"))
        container = self._container if how == "taken" else f"{self._container}-fails"
        if how != "hangs up":
            connection.send(Hello(container, "/dev/null", "/dev/null"))
        else:
            sockets = VmSockets(self._directory, f"{self._number}-fails")
            try:
                connection.send(sockets.hello(container))
                for channel in sockets.accept():
                    channel.close()
            finally:
                sockets.close()
        connection.expect(False, f"hello ({how})")
