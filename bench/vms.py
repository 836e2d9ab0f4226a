"""The VMs: one process plays the agents of all of them."""

import os
import select
import socket
import struct
import sys
import time

from bench.flow import End, Generator, expect_silence, make_blocking, receive_into, receive_some
from bench.streams import (
    BUFFER_SIZE,
    FIRST_MARKER,
    NEIGHBOUR_FRAMES,
    NEIGHBOUR_PAYLOAD,
    NEIGHBOUR_RATE,
    StdinCheck,
    cycle_of,
)
from bench.worker import serve
from cc_proxy.api import FrameParser, encode_frame
from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.hyperstart.codes import Code

MESSAGE = struct.Struct(">II")
READY = MESSAGE.pack(Code.READY, MESSAGE.size)
ACK = MESSAGE.pack(Code.ACK, MESSAGE.size)
_PING = MESSAGE.pack(Code.PING, MESSAGE.size)


class Vms(Generator):
    """`ends` are the VMs' ends of their I/O channels. The public methods are orders (`bench.worker`)."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._directory = directory
        self._listeners: list[socket.socket] = []
        self._controls: list[socket.socket] = []

    def open(self, count: int) -> list[list[str]]:
        """Listen for this many VMs; returns for each the paths of its control and I/O channel."""
        paths = [[f"{self._directory}/vm{vm}.{channel}" for channel in ("ctl", "io")] for vm in range(count)]
        self._listeners = [listen(path) for pair in paths for path in pair]
        return paths

    def boot(self) -> None:
        """Let the proxy connect to each VM, and send READY."""
        for control, io in zip(self._listeners[::2], self._listeners[1::2], strict=True):
            self._controls.append(make_blocking(control.accept()[0]))
            self._accept(io)
            self._controls[-1].sendall(READY)

    def accept(self) -> None:
        """Let the relay connect to the I/O channel of each VM."""
        for io in self._listeners[1::2]:
            self._accept(io)

    def start(self, processes: int) -> None:
        """Acknowledge this many commands, taking the VMs in turn."""
        for number in range(processes):
            control = self._controls[number % len(self._controls)]
            receive_some(control)
            control.sendall(ACK)

    def assign(self, streams: list[list[int]]) -> None:
        """Note the streams of each VM."""
        for end, seqs in zip(self.ends, streams, strict=True):
            end.seqs = tuple(seqs)

    def receive_stdin(self, payload: int, frames: int, cycles: int) -> float:
        """Receive and check what all clients of the first VM send; returns when that was done."""
        io = make_blocking(self.ends[0].sock)
        cycles_of = {seq: cycle_of(0, (seq,), payload, frames) for seq in self.ends[0].seqs}
        check = StdinCheck(cycles_of, payload, cycles)
        buffer = bytearray(BUFFER_SIZE)
        view = memoryview(buffer)
        held = 0
        while check.left:
            size = receive_into(io, view[held:])
            used = check.take(buffer, view, held + size)
            if check.markers:
                io.sendall(b"".join(check.markers))
                check.markers.clear()
            held += size - used
            buffer[:held] = buffer[used : used + held]
        ended = time.monotonic()
        if not held:
            expect_silence(self.ends[0])
        return ended

    def echo(self) -> None:
        """Send back what comes, including markers, until a client sends end of file."""
        io = make_blocking(self.ends[0].sock)
        while not _is_end(data := receive_some(io)):
            io.sendall(data)

    def echo_on(self, clients: int) -> None:
        """Send back what comes to each VM, including markers, until `clients` ends of file have come."""
        parsers = {}
        with select.epoll() as epoll:
            for end in self.ends:
                sock = make_blocking(end.sock)
                parsers[sock.fileno()] = sock, FrameParser()
                epoll.register(sock, select.EPOLLIN)
            while clients:
                for fd, _ in epoll.poll():
                    io, parser = parsers[fd]
                    frames = parser.receive_data(receive_some(io))
                    io.sendall(b"".join(encode_frame(*frame) for frame in frames))
                    clients -= sum(seq < FIRST_MARKER and not payload for seq, payload in frames)

    def echo_beside(self, seq: int, cycles: int) -> None:
        """Do the same as `echo`, and meanwhile send cycles to a neighbour, a frame each millisecond."""
        io = make_blocking(self.ends[0].sock)
        cycle = memoryview(cycle_of(0, (seq,), NEIGHBOUR_PAYLOAD, NEIGHBOUR_FRAMES))
        size = len(cycle) // NEIGHBOUR_FRAMES
        frames = [cycle[at : at + size] for at in range(0, len(cycle), size)] * cycles
        frames.reverse()
        poll = select.poll()
        poll.register(io, select.POLLIN)
        due = time.monotonic()
        data = b""
        while not _is_end(data):
            if frames and time.monotonic() >= due:
                io.sendall(frames.pop())
                due += 1 / NEIGHBOUR_RATE
            data = b""
            if poll.poll(max(0.0, due - time.monotonic()) * 1000 if frames else None):
                data = receive_some(io)
                if not _is_end(data):
                    io.sendall(data)
        for frame in reversed(frames):
            io.sendall(frame)

    def answer_pings(self) -> None:
        """Acknowledge commands, up to the first that is not a ping."""
        control = self._controls[0]
        command = _PING
        while command == _PING:
            command = receive_some(control)
            control.sendall(ACK)

    def open_hop(self) -> str:
        """Listen for `hop`; returns the path."""
        path = f"{self._directory}/hop"
        self._listeners = [listen(path)]
        return path

    def hop(self) -> None:
        """Send back what comes on one connection after the other, until one is closed without a byte."""
        while self._serve_hop(self._listeners[0]):
            pass

    def close(self) -> None:
        """Hang up."""
        self.close_ends()
        for sock in self._controls:
            sock.close()
        for listener in self._listeners:
            path = listener.getsockname()
            listener.close()
            os.unlink(path)
        self._controls.clear()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        self.ends.append(End(make_blocking(listener.accept()[0]), len(self.ends), ()))

    def _serve_hop(self, listener: socket.socket) -> bool:
        with listener.accept()[0] as sock:
            data = sock.recv(BUFFER_SIZE)
            if not data:
                return False
            while data:
                sock.sendall(data)
                data = sock.recv(BUFFER_SIZE)
            return True


def _is_end(data: bytes) -> bool:
    """Whether this is a client's end of file, which must have come in a read of its own."""
    if len(data) != FRAME_HEADER.size:
        return False
    seq, length = FRAME_HEADER.unpack(data)
    return bool(seq < FIRST_MARKER and length == FRAME_HEADER.size)


def listen(path: str) -> socket.socket:
    listener = make_blocking(socket.socket(socket.AF_UNIX))
    listener.bind(path)
    listener.listen(64)
    return listener


if __name__ == "__main__":
    serve(Vms(sys.argv[1]))
