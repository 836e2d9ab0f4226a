"""A channel whose process is killed under load, again and again: what clients and the VM get is right."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.api.frames import FrameParser, encode_frame
from cc_proxy.hyperstart.pacing import FIRST_MARKER
from cc_proxy.proxy.streams.interfaces import BUFFER_SIZE

SESSIONS = 4
STDIN = 64 << 20
NUMBER = struct.Struct(">I")


def payload_of(seq: int, number: int) -> bytes:
    """Payload of the frame with this number: it tells whose it is, and looks like a header at its end."""
    rng = random.Random(seq << 32 | number)
    size = rng.choice([0, 20, 100, 1_000, 4_084, 10_210])
    filling = bytes([seq]) * size if size < 2_000 else encode_frame(rng.randrange(1, 9), bytes(100)) * 80
    return NUMBER.pack(number) + filling[:size]


class Client:
    """One that takes output and sends stdin, each in a thread, and checks what it gets."""

    def __init__(self, seq: int, frame_size: int, slow: bool) -> None:
        self.seq = seq
        self.ours, self.theirs = socket.socketpair()
        self.frame_size = frame_size
        self.slow = slow
        self.stop = threading.Event()
        self.next = {seq: 0, seq + 1: 0}
        self.gaps: Counter[int] = Counter()
        self.lost = 0
        self.wrong: list[str] = []
        self.got = 0
        self.stdin = random.Random(seq).randbytes(1 << 20)
        self.sent = 0
        self.over = False

    def read(self) -> None:
        parser = FrameParser()
        with suppress(OSError):
            while data := self.ours.recv(1 << 16 if not self.slow else 1 << 12):
                if self.slow:
                    time.sleep(0.001)
                for frame in parser.receive_data(data):
                    self.take(frame.seq, frame.payload)
        self.over = True

    def take(self, seq: int, payload: bytes) -> None:
        if seq not in self.next:
            self.wrong.append(f"a frame of {seq}")
            return
        number = NUMBER.unpack_from(payload)[0]
        if payload != payload_of(seq, number) or number < self.next[seq]:
            self.wrong.append(f"frame {number} of {seq} after {self.next[seq]}")
        if number > self.next[seq]:
            self.gaps[seq] += 1
            self.lost += sum(12 + len(payload_of(seq, each)) for each in range(self.next[seq], number))
        self.next[seq] = number + 1
        self.got += 1

    def write(self) -> None:
        rng = random.Random(self.seq)
        with suppress(OSError):
            while not self.stop.is_set():
                size = rng.randrange(1, self.frame_size)
                at = self.sent % len(self.stdin)
                payload = self.stdin[at : at + size]
                self.ours.sendall(encode_frame(self.seq, payload))
                self.sent += len(payload)


class Vm:
    """One that sends output for all of them, and checks their stdin."""

    def __init__(self, clients: list[Client]) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.clients = {client.seq: client for client in clients}
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.at = dict.fromkeys(self.clients, 0)
        self.gaps: Counter[int] = Counter()
        self.lost: Counter[int] = Counter()
        self.sent: Counter[int] = Counter()
        self.markers: list[bytes] = []
        self.frames = 0

    def write(self) -> None:
        rng = random.Random(1)
        with suppress(OSError):
            while not self.stop.is_set():
                frames = []
                for _ in range(rng.randrange(1, 60)):
                    seq = rng.choice(list(self.clients)) + rng.randrange(2)
                    frames += [encode_frame(seq, payload_of(seq, self.sent[seq] + each)) for each in range(3)]
                    self.sent[seq] += 3
                while self.markers:
                    frames.append(self.markers.pop())
                self.ours.sendall(b"".join(frames))

    def read(self) -> None:
        parser = FrameParser()
        with suppress(OSError):
            while data := self.ours.recv(1 << 17):
                for frame in parser.receive_data(data):
                    self.frames += 1
                    if len(frame.payload) > 4_084:
                        self.wrong.append("a frame that is too long")
                    if frame.seq >= FIRST_MARKER:
                        self.markers.append(encode_frame(frame.seq))
                    elif frame.seq in self.clients:
                        self.take(self.clients[frame.seq], frame.payload)
                    else:
                        self.wrong.append(f"a frame of {frame.seq}")

    def take(self, client: Client, payload: bytes) -> None:
        """Payload goes on where the last ended, or further on if there is a gap."""
        seq, stdin = client.seq, client.stdin
        at = self.at[seq] % len(stdin)
        if not (stdin + stdin[:10_000]).startswith(payload, at):
            ahead = (stdin + stdin).find(payload, at)
            if ahead < 0 or len(payload) < 8:
                self.wrong.append(f"stdin of {seq} at {self.at[seq]}: {payload[:20]!r}")
                return
            self.gaps[seq] += 1
            self.lost[seq] += ahead - at
            self.at[seq] += ahead - at
        self.at[seq] += len(payload)


class Generation:
    """One process after the other, each with memory of its own."""

    def __init__(self, stack: ExitStack, fds: list[int]) -> None:
        self.memory = [os.memfd_create("buffers"), os.memfd_create("cells")]
        os.ftruncate(self.memory[0], 2 * BUFFER_SIZE)
        os.ftruncate(self.memory[1], 64 * 1024)
        for fd in self.memory:
            stack.callback(os.close, fd)
        self._fds = fds

    def start(self, stack: ExitStack, memories: list[int]) -> None:
        """Begin to import, so that it is quick when it is its turn."""
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.proxy.streams.killed"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[*self._fds, *memories],
            )
        )
        stack.callback(self.process.kill)

    def go(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({**order, "memory": self.memory}).encode() + b"\n")
        self.process.stdin.flush()
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said


@pytest.mark.parametrize(
    ("window", "frame_size", "seed"), [(0, 9_000, 1), (0, 500, 2), (512, 300, 3), (512, 9_000, 4)]
)
def test_killed_under_load(tmp_path: Path, window: int, frame_size: int, seed: int) -> None:
    kills = int(os.environ.get("KILLS", "6"))
    rng = random.Random(seed)
    clients = [Client(1 + 2 * number, frame_size, slow=number == 3) for number in range(SESSIONS)]
    vm = Vm(clients)
    with ExitStack() as stack:
        for client in clients:
            stack.callback(client.ours.close)
            stack.callback(client.theirs.close)
        stack.callback(vm.ours.close)
        stack.callback(vm.theirs.close)
        fds = [vm.theirs.fileno(), *(client.theirs.fileno() for client in clients)]
        generations = [Generation(stack, fds) for _ in range(kills + 1)]
        for before, after in zip([generations[-1], *generations], generations, strict=False):
            after.start(stack, before.memory + after.memory)
        threads = [
            threading.Thread(target=target)
            for target in (vm.read, vm.write, *(c.read for c in clients), *(c.write for c in clients))
        ]
        order: dict[str, Any] = {
            "directory": str(tmp_path),
            "io": vm.theirs.fileno(),
            "sessions": [(client.seq, client.theirs.fileno()) for client in clients],
            "next_seq": 2 * SESSIONS + 1,
            "window": window,
            "before": None,
        }
        gaps: list[tuple[bool, list[int], int]] = []
        hung_up: list[tuple[int, str]] = []
        resyncs = 0
        for number, generation in enumerate(generations):
            said = generation.go(order)
            if not number:
                for thread in threads:
                    thread.start()
            else:
                assert not said["lost"]
                gaps += said["gaps"]
                resyncs += said["resync"]
                for seq, reason in said["hung_up"]:
                    hung_up.append((seq, reason))
                    client = next(client for client in clients if client.seq == seq)
                    client.theirs.shutdown(socket.SHUT_RDWR)
                    order["sessions"] = [(s, -1 if s == seq else fd) for s, fd in order["sessions"]]
            time.sleep(rng.uniform(0.05, 0.3))
            if number < kills:
                generation.process.send_signal(signal.SIGKILL)
                generation.process.wait()
                order["before"] = generation.memory
        vm.stop.set()
        for client in clients:
            client.stop.set()
        time.sleep(0.5)
        vm.theirs.shutdown(socket.SHUT_RDWR)
        generations[-1].process.wait(20)
        for client in clients:
            client.theirs.shutdown(socket.SHUT_RDWR)
            client.ours.shutdown(socket.SHUT_WR)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    print(
        "frames",
        vm.frames,
        [c.got for c in clients],
        "gaps",
        [dict(c.gaps) for c in clients],
        [c.lost for c in clients],
        "stdin",
        dict(vm.gaps),
        dict(vm.lost),
        "hung up",
        hung_up,
        "resyncs",
        resyncs,
    )
    print(gaps)
    assert not vm.wrong
    for client in clients:
        assert not client.wrong
        assert all(count <= kills for count in client.gaps.values())
        most = sum(
            most for to_vm, streams, most in gaps if not to_vm and (not streams or client.seq in streams)
        )
        assert client.lost <= most
        assert vm.lost[client.seq] <= sum(
            most for to_vm, streams, most in gaps if to_vm and client.seq in streams
        )
