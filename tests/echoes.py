"""Streams that carry bytes both ways all the time: whatever a client sends has to come back, in order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cc_proxy.api import FrameParser
from tests.wire.daemon import Pod
from tests.wire.support import MARKER, Stream, frame

_CYCLE = random.Random(1).randbytes(64 * 1024)
_LONGEST = 3_000
#: What ends a VM's side of it: no client sends an empty frame before.
_END = b""


class Echo:
    """One stream. A thread of its own sends, and another one reads what comes back."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._start = random.Random(stream.base).randrange(len(_CYCLE))
        self.sent = 0

    def send(self, over: threading.Event) -> None:
        """Send frames of any length until it is over, and then end of file."""
        dice = random.Random(self._start)
        while not over.is_set():
            payload = self._bytes(self.sent, dice.randint(1, _LONGEST))
            self._stream.send(payload)
            self.sent += len(payload)
        self._stream.send(_END)

    def read(self) -> int:
        """Read until the end of file comes back; returns the number of bytes, each of them right."""
        got = 0
        while payload := self._stream.read_frame().payload:
            assert payload == self._bytes(got, len(payload)), f"stream {self._stream.base}, from byte {got}"
            got += len(payload)
        return got

    def _bytes(self, at: int, size: int) -> bytes:
        at = (self._start + at) % len(_CYCLE)
        return (_CYCLE + _CYCLE[:_LONGEST])[at : at + size]


def _answer(pod: Pod, streams: int) -> None:
    """Be the VM: send everything back, markers too, until each of so many streams has ended."""
    parser = FrameParser()
    while streams:
        frames = parser.receive_data(pod.vm.io.recv(65_536))
        pod.vm.io.sendall(b"".join(frame(seq, payload) for seq, payload in frames))
        streams -= sum(seq < MARKER and payload == _END for seq, payload in frames)


@contextmanager
def echoes(pods: Sequence[Pod], each: int) -> Iterator[list[Echo]]:
    """Have bytes go round over so many streams of each pod until the block ends; then all have come back."""
    over = threading.Event()
    found = [Echo(pod.open(1)) for pod in pods for _ in range(each)]
    with ThreadPoolExecutor(2 * len(found) + len(pods)) as pool:
        vms = [pool.submit(_answer, pod, each) for pod in pods]
        senders = [pool.submit(echo.send, over) for echo in found]
        readers = [pool.submit(echo.read) for echo in found]
        try:
            yield found
        finally:
            over.set()
        for done in (*senders, *vms):
            done.result()
        assert [reader.result() for reader in readers] == [echo.sent for echo in found]


def all_moved(streams: Sequence[Echo], since: Sequence[int]) -> bool:
    """Whether all have sent more than they had."""
    return all(stream.sent > sent for stream, sent in zip(streams, since, strict=True))
