"""A VM and clients that keep a channel busy, and know what each of them has to get."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress

from cc_proxy.api.frames import FrameParser, encode_frame
from cc_proxy.hyperstart.frames import MAX_TO_AGENT
from cc_proxy.hyperstart.pacing import FIRST_MARKER

_NUMBER = struct.Struct(">I")


def payload_of(seq: int, number: int) -> bytes:
    """Payload of a frame of output, which tells whose it is; the longer ones are full of other frames."""
    rng = random.Random(seq << 32 | number)
    size = rng.choice([0, 20, 100, 1_000, 4_084, 10_210])
    filling = bytes([seq]) * size if size < 2_000 else encode_frame(rng.randrange(1, 9), bytes(100)) * 92
    return _NUMBER.pack(number) + filling[:size]


class Client:
    """One that takes output and sends stdin, in a thread each."""

    def __init__(self, seq: int, longest: int) -> None:
        self.seq = seq
        self.ours, self.theirs = socket.socketpair()
        self._longest = longest
        self._next = {seq: 0, seq + 1: 0}
        self.stdin = random.Random(seq).randbytes(1 << 20)
        self.twice = 2 * self.stdin  # what follows the end is the beginning
        self.frames = 0
        #: How often output was missing, and how much.
        self.gaps: Counter[int] = Counter()
        self.lost = 0
        self.wrong: list[str] = []

    def read(self) -> None:
        parser = FrameParser()
        with suppress(OSError):
            while data := self.ours.recv(1 << 16):
                for frame in parser.receive_data(data):
                    self._take(frame.seq, frame.payload)

    def _take(self, seq: int, payload: bytes) -> None:
        (number,) = _NUMBER.unpack_from(payload)
        expected = self._next.get(seq, number + 1)
        if payload != payload_of(seq, number) or number < expected:
            self.wrong.append(f"frame {number} of {seq} instead of {expected}")
            return
        if number > expected:
            self.gaps[seq] += 1
            self.lost += sum(12 + len(payload_of(seq, each)) for each in range(expected, number))
        self._next[seq] = number + 1
        self.frames += 1

    def write(self, stop: threading.Event, pause: float) -> None:
        rng, at = random.Random(self.seq), 0
        with suppress(OSError):
            while not stop.wait(pause):
                payload = self.stdin[at : at + rng.randrange(1, self._longest)]
                self.ours.sendall(encode_frame(self.seq, payload))
                at = (at + len(payload)) % len(self.stdin)


class Vm:
    """One that sends output for all clients, and takes their stdin."""

    def __init__(self, clients: list[Client]) -> None:
        self.ours, self.theirs = socket.socketpair()
        self._clients = {client.seq: client for client in clients}
        self._at = dict.fromkeys(self._clients, 0)
        self._sent: Counter[int] = Counter()
        self._markers: list[bytes] = []
        #: How often stdin was missing, and how much.
        self.gaps: Counter[int] = Counter()
        self.lost: Counter[int] = Counter()
        self.wrong: list[str] = []

    def write(self, stop: threading.Event, pause: float) -> None:
        rng = random.Random(1)
        with suppress(OSError):
            while not stop.wait(pause):
                frames = [self._frame(rng) for _ in range(1 if pause else rng.randrange(1, 60))]
                while self._markers:
                    frames.append(self._markers.pop(0))
                self.ours.sendall(b"".join(frames))

    def _frame(self, rng: random.Random) -> bytes:
        seq = rng.choice(list(self._clients)) + rng.randrange(2)
        self._sent[seq] += 1
        return encode_frame(seq, payload_of(seq, self._sent[seq] - 1))

    def read(self) -> None:
        parser = FrameParser()
        with suppress(OSError):
            while data := self.ours.recv(1 << 17):
                for frame in parser.receive_data(data):
                    self._take(frame.seq, frame.payload)

    def _take(self, seq: int, payload: bytes) -> None:
        if seq >= FIRST_MARKER:
            self._markers.append(encode_frame(seq))
        elif seq not in self._clients or 12 + len(payload) > MAX_TO_AGENT:
            self.wrong.append(f"{len(payload)} bytes for {seq}")
        else:
            self._go_on(seq, payload)

    def _go_on(self, seq: int, payload: bytes) -> None:
        """Stdin goes on where it ended, or further on if there is a gap."""
        client, at = self._clients[seq], self._at[seq]
        ahead = client.twice.find(payload, at)
        if ahead < 0:
            self.wrong.append(f"stdin of {seq} at {at}: {payload[:20].hex()}")
            return
        if ahead > at:
            self.gaps[seq] += 1
            self.lost[seq] += ahead - at
        self._at[seq] = (ahead + len(payload)) % len(client.stdin)


class Load:
    """All of them, at work from `start` to `stop`. As a context manager, it closes all ends."""

    def __init__(self, sessions: int, longest: int, pause: float) -> None:
        self.clients: list[Client] = [Client(1 + 2 * number, longest) for number in range(sessions)]
        self.vm = Vm(self.clients)
        self._enough = threading.Event()
        reading = [self.vm.read, *(client.read for client in self.clients)]
        writing = [self.vm.write, *(client.write for client in self.clients)]
        self._readers = [threading.Thread(target=each) for each in reading]
        self._writers = [threading.Thread(target=each, args=(self._enough, pause)) for each in writing]

    def start(self) -> None:
        for thread in (*self._readers, *self._writers):
            thread.start()

    def stop(self) -> None:
        """Send no more. What has been sent has yet to arrive."""
        self._enough.set()
        for thread in self._writers:
            thread.join(20)

    def hang_up(self, seq: int) -> None:
        (client,) = (client for client in self.clients if client.seq == seq)
        client.theirs.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        ends = [self.vm.ours, self.vm.theirs]
        for client in self.clients:
            ends += (client.ours, client.theirs)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in (*self._readers, *self._writers):
            if thread.ident:
                thread.join(20)
        for end in ends:
            end.close()
