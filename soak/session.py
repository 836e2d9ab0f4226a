"""One I/O fd, over which a process and its client send each other bytes. Every byte is checked."""

import contextlib
import socket
from collections.abc import Iterator
from typing import NamedTuple

from bench.streams import StreamCheck, WrongBytesError, cycle_of, payload_of, repeated
from cc_proxy.api import encode_frame
from cc_proxy.api.frames import FRAME_HEADER
from soak.habits import Habit

_CYCLE_FRAMES = 16
#: More than any stream ever carries.
_ENDLESS = 1 << 40
#: The exit status of a process, which it sends after end of file.
_STATUS = b"\0"
#: After a pause, only what was due in this many seconds is sent: nobody catches up on the rest.
_MOST_AT_ONCE = 0.1


class Chunk(NamedTuple):
    """Whole frames of one length that go to the I/O channel, and the session whose output they are."""

    session: "Session | None"
    frames: memoryview | bytes
    frame_size: int


class Session:
    """One client's fd, and the process at its other end.

    One object plays both, so that each end knows what the other has done.
    """

    def __init__(
        self, vm: int, seqs: tuple[int, ...], sock: socket.socket, habit: Habit, ends_at: float
    ) -> None:
        self.habit = habit
        self.seqs = seqs
        self.sock = sock
        self.ends_at = ends_at
        #: Whether the client has closed its fd: before its time, or because everything has come.
        self.closed = False
        self._name = f"VM {vm}, stream {seqs[0]} ({habit.name})"
        cycle = cycle_of(vm, seqs, habit.payload, _CYCLE_FRAMES)
        self._frame_size = habit.payload + FRAME_HEADER.size
        self._wire = memoryview(repeated(cycle, 8 * self._frame_size))
        self._period = len(cycle)
        self._output = StreamCheck(self._name, cycle, _ENDLESS // len(cycle))
        said = b"".join(payload_of(vm, seqs[0], number, habit.payload) for number in range(_CYCLE_FRAMES))
        self._said = memoryview(repeated(said, habit.payload))
        self._stdin = StreamCheck(f"{self._name}: stdin", said, _ENDLESS // len(said))
        # Output.
        self._budget = 0.0
        self._queued = self._sent = self._received = 0
        self._tail: bytes | None = None
        # Stdin.
        self._allowance = 0.0
        self._unsent = memoryview(b"")
        self._stdin_sent = self._stdin_got = 0
        self._stops_sending = self._half_closed = self._at_eof = self._broke_rules = False

    @property
    def bytes_passed(self) -> int:
        """Bytes that have arrived: output with its headers, and the payload of stdin."""
        return self._received + self._stdin_got

    # The process ------------------------------------------------------------------------------------------

    def output(self, seconds: float) -> Iterator[Chunk]:
        """Yield what the process writes in this time."""
        if self.closed or self._tail is not None:
            return
        rate = self.habit.down
        self._budget = min(self._budget + rate * seconds, max(rate * _MOST_AT_ONCE, self.habit.payload))
        frames, self._budget = divmod(self._budget, self.habit.payload)
        while frames > 0:
            some = min(int(frames), 8)
            yield self._frames(some)
            frames -= some
        if self._at_eof:
            yield from self.exit()

    def exit(self) -> Iterator[Chunk]:
        """Yield the frames that tell that the process has ended."""
        if self._tail is None:
            end, status = encode_frame(self.seqs[0]), encode_frame(self.seqs[0], _STATUS)
            self._tail = end + status
            yield Chunk(self, end, len(end))
            yield Chunk(self, status, len(status))

    def take_stdin(self, payload: memoryview) -> Iterator[Chunk]:
        """Check the payload of a frame of stdin; yields the answer, if any. Raises `WrongBytesError`."""
        if not payload:
            self._take_end()
            return
        if self._at_eof:
            raise WrongBytesError(f"{self._name}: stdin after its end")
        self._stdin.take(payload)
        self._stdin_got += len(payload)
        if self.habit.answers and not self.closed and self._tail is None:
            yield self._frames(1)

    def sent(self, size: int) -> None:
        """Note that this many bytes of the output have been sent on the I/O channel."""
        self._sent += size

    def _frames(self, count: int) -> Chunk:
        at = self._queued % self._period
        size = count * self._frame_size
        self._queued += size
        return Chunk(self, self._wire[at : at + size], self._frame_size)

    def _take_end(self) -> None:
        if self._half_closed and self._stdin_got != self._stdin_sent:
            raise WrongBytesError(f"{self._name}: stdin ends after {self._stdin_got} of {self._stdin_sent}")
        if not (self._half_closed or self.closed or self._broke_rules):
            raise WrongBytesError(f"{self._name}: stdin ends, which its client did not say")
        self._at_eof = True

    # The client -------------------------------------------------------------------------------------------

    def wants_to_read(self, now: float) -> bool:
        """Whether the client reads at present."""
        habit = self.habit
        return habit.reads and (not habit.stall or now % (2 * habit.stall) < habit.stall)

    def write(self, seconds: float) -> None:
        """Send the stdin that is due, as far as the socket takes it."""
        if self._half_closed or self.closed:
            return
        habit = self.habit
        if not self._stops_sending:
            most = max(habit.up * _MOST_AT_ONCE, habit.payload)
            self._allowance = min(self._allowance + habit.up * seconds, most)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._unsent or self._allowance >= habit.payload:
                self._send_frame()
            if self._stops_sending and not self._unsent:
                self._say_end()

    def end(self, how: str) -> Iterator[Chunk]:
        """Begin to end, in the way of `Habit.end`; yields what the process writes because of that."""
        if how == "close":
            self.close()
        elif how == "exit":
            yield from self.exit()
        else:
            self._stops_sending = True
            self._allowance = 0.0

    def read(self, vm_gone: bool) -> None:
        """Read what has come. Raises `WrongBytesError`, also for an end that neither side has caused."""
        while not self.closed:
            try:
                data = self.sock.recv(self._output.read_size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if data:
                self._take(data)
            else:
                self._take_hang_up(vm_gone)

    def close(self) -> None:
        self.closed = True
        self.sock.close()

    def is_settled(self) -> bool:
        """Whether all stdin that was sent has arrived in the VM."""
        return self._stdin_got == self._stdin_sent and (self.closed or not self._unsent)

    def __str__(self) -> str:
        return (
            f"{self._name}: {self._received} of {self._sent} bytes of output, "
            f"{self._stdin_got} of {self._stdin_sent} of stdin"
        )

    def _send_frame(self) -> None:
        if not self._unsent:
            at = self._stdin_sent % (_CYCLE_FRAMES * self.habit.payload)
            self._allowance -= self.habit.payload
            self._unsent = memoryview(encode_frame(self.seqs[0], self._said[at : at + self.habit.payload]))
        before = min(len(self._unsent), self.habit.payload)
        self._unsent = self._unsent[self.sock.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        self._stdin_sent += before - min(len(self._unsent), self.habit.payload)

    def _say_end(self) -> None:
        if self.habit.end == "nonsense":
            self._broke_rules = self._half_closed = True
            self.sock.send(encode_frame(self.seqs[-1] + 1, b"nonsense"), socket.MSG_NOSIGNAL)
        else:
            self._half_closed = True
            self.sock.shutdown(socket.SHUT_WR)

    def _take(self, data: bytes) -> None:
        body = len(data) if self._tail is None else max(0, min(len(data), self._queued - self._received))
        self._output.take(memoryview(data)[:body])
        behind = data[body:]
        self._received += len(data)
        if self._tail is not None and self._received > self._queued:
            at = self._received - self._queued
            if self._tail[at - len(behind) : at] != behind:
                raise WrongBytesError(f"{self._name}: not what tells of the end: {behind[:40]!r}")
            if at == len(self._tail):
                self.close()

    def _take_hang_up(self, vm_gone: bool) -> None:
        if vm_gone and self._received != self._sent and not self._broke_rules:
            raise WrongBytesError(f"{self._name}: ended after {self._received} of {self._sent} bytes")
        if not vm_gone and not self._broke_rules:
            raise WrongBytesError(f"{self._name}: ended, which nobody has caused")
        self.close()
