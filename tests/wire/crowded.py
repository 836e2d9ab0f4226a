"""Streams that are full, and commands, for a daemon that is killed meanwhile: everything is accounted for."""

from __future__ import annotations

import random
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from cc_proxy.api import FrameParser
from tests.wire.daemon import Pod
from tests.wire.support import (
    ACK,
    GETVERSION,
    MARKER,
    OK,
    VERSION_NUMBER,
    RawClient,
    Stream,
    frame,
    refused,
    request,
)

#: Of which stream a record of output is, and its number there.
_RECORD = struct.Struct(">QQ")
#: Records in a frame, and frames of each stream in one write of the VM's.
_IN_FRAME, _IN_WRITE = 8, 16
_LAST = 2**63
#: Records that a client may be behind, and how long a VM waits for it then: what it waits for may be lost.
_MOST_BEHIND, _PATIENCE = 1_024, 0.01
_LONGEST_STDIN = 3_000
#: So many bytes are not met by chance.
_SURE = 16


class Output:
    """What a VM sends on a stream: records, in whole frames and in order, but for gaps."""

    def __init__(self, seq: int) -> None:
        self._seq = seq
        self._sent = 0
        self._last = -1
        self._came = threading.Event()
        self.came = 0
        #: Bytes of frames.
        self.missing = 0

    def frame(self) -> bytes:
        numbers = range(self._sent, self._sent + _IN_FRAME)
        self._sent += _IN_FRAME
        return frame(self._seq, b"".join(_RECORD.pack(self._seq, number) for number in numbers))

    def wait_for_client(self) -> None:
        """Wait a little if the client is behind, so that nothing has to be spooled for it."""
        if self._sent - self._last > _MOST_BEHIND:
            self._came.clear()
            self._came.wait(_PATIENCE)

    def end(self) -> bytes:
        return frame(self._seq, _RECORD.pack(self._seq, _LAST))

    def take(self, payload: bytes) -> bool:
        """Take the payload of a frame; returns whether it was the last one."""
        records = [*_RECORD.iter_unpack(payload)]
        assert {seq for seq, _ in records} == {self._seq}
        first = records[0][1]
        if first == _LAST:
            first = self._sent
        assert first > self._last
        assert first % _IN_FRAME == 0
        assert len(records) == (1 if records[0][1] == _LAST else _IN_FRAME)
        self.missing += (first - self._last - 1) // _IN_FRAME * len(frame(0, bytes(_IN_FRAME * _RECORD.size)))
        self._last = records[-1][1]
        self.came += 1
        self._came.set()
        return bool(records[0][1] == _LAST)


class Stdin:
    """What a client sends on a stream: bytes, in any frames and in order, but for gaps."""

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self._dice = random.Random(seq)
        self._sent, self._came = bytearray(), bytearray()

    @property
    def came(self) -> int:
        return len(self._came)

    def frame(self) -> bytes:
        payload = self._dice.randbytes(self._dice.randint(1, _LONGEST_STDIN))
        self._sent += payload
        return frame(self.seq, payload)

    def take(self, payload: bytes) -> None:
        self._came += payload

    @property
    def missing(self) -> int:
        """How many bytes are not there; all others are, each at its place."""
        came, at = bytes(self._came), 0
        for begin in range(0, len(came), _SURE):
            piece = came[begin : begin + _SURE]
            found = self._sent.find(piece, at, at + len(piece))
            while found < 0 and piece:  # a gap somewhere in it
                piece = piece[:-1]
                found = self._sent.find(piece, at, at + len(piece))
            at += len(piece)
            rest = came[begin + len(piece) : begin + len(piece) + _SURE]
            if len(piece) < _SURE and rest:
                at = self._sent.find(rest, at)
                assert at >= 0, f"not what was sent, from byte {begin} on"
                at += max(0, min(_SURE - len(piece), len(came) - begin - len(piece)))
        return len(self._sent) - len(came)


class Crowd:
    """All that goes on."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.output: list[Output] = []
        self.stdin: list[Stdin] = []
        #: How many commands a client has asked for, and how often each answer came.
        self.asked = 0
        self.answers: Counter[bytes] = Counter()

    @property
    def moved(self) -> list[int]:
        """What has to grow while all go on."""
        output, stdin = [each.came for each in self.output], [each.came for each in self.stdin]
        return [*output, *stdin, self.answers[OK]]

    def goes_on(self, since: Sequence[int]) -> bool:
        return all(now > before for now, before in zip(self.moved, since, strict=True))

    def work_of(self, pod: Pod, each: int) -> Iterator[Callable[[], None]]:
        """Yield what is to be done in threads for one VM and its clients."""
        lock = threading.Lock()  # of what writes to the I/O channel
        streams = [pod.open(1) for _ in range(each)]
        output = [Output(stream.base) for stream in streams]
        stdin = {stream.base: Stdin(stream.base) for stream in streams}
        self.output += output
        self.stdin += stdin.values()
        yield partial(self._write_output, pod, output, lock)
        yield partial(self._read_stdin, pod, stdin, lock)
        yield partial(self._be_agent, pod)
        for stream, sent in zip(streams, output, strict=True):
            yield partial(self._write_stdin, stream, stdin[stream.base])
            yield partial(self._read_output, stream, sent)

    def _write_output(self, pod: Pod, output: Sequence[Output], lock: threading.Lock) -> None:
        while not self.over.is_set():
            for each in output:
                each.wait_for_client()
            with lock:
                pod.vm.io.sendall(b"".join(each.frame() for each in output for _ in range(_IN_WRITE)))
        with lock:
            pod.vm.io.sendall(b"".join(each.end() for each in output))

    def _read_stdin(self, pod: Pod, stdin: dict[int, Stdin], lock: threading.Lock) -> None:
        parser, still = FrameParser(), set(stdin)
        while still:
            for seq, payload in parser.receive_data(pod.vm.io.recv(65_536)):
                if seq >= MARKER:
                    with lock:
                        pod.vm.io.sendall(frame(seq))
                elif payload:
                    stdin[seq].take(payload)
                else:
                    still.discard(seq)

    def _write_stdin(self, stream: Stream, stdin: Stdin) -> None:
        while not self.over.is_set():
            stream.sock.sendall(stdin.frame())
        stream.send()

    def _read_output(self, stream: Stream, output: Output) -> None:
        while not output.take(stream.read_frame().payload):
            pass

    def _be_agent(self, pod: Pod) -> None:
        while (command := pod.vm.read_command()).payload != b'"last"':
            pod.vm.say(ACK, VERSION_NUMBER if command.code == GETVERSION else b"")
        pod.vm.say(ACK)

    def ask(self, client: RawClient, pods: Sequence[Pod]) -> None:
        """Ask for one command after another, each once the one before has its answer."""
        while not self.over.is_set():
            client.hyper("ping", '"x"')
            self.asked += 1
            self.answers[client.receive()] += 1
        client.send(request("the end"))
        while (answer := client.receive()) != refused("no payload named 'the end'"):
            self.answers[answer] += 1
        for pod in pods:
            pod.client.hyper("ping", '"last"')
            assert pod.client.receive() == OK


@contextmanager
def crowd(pods: Sequence[Pod], client: RawClient, each: int) -> Iterator[Crowd]:
    """Have streams of each pod be full in both directions, and a client ask, until the block ends."""
    found = Crowd()
    work = [work for pod in pods for work in found.work_of(pod, each)]
    work.append(partial(found.ask, client, pods))
    with ThreadPoolExecutor(len(work)) as pool:
        done = [pool.submit(job) for job in work]
        try:
            yield found
        finally:
            found.over.set()
        for job in done:
            job.result()
