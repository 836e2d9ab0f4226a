"""Two ways to talk to a real VM: directly over its sockets, as the proxy does, and through the proxy."""

import itertools
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import msgspec

from bench.processes import BenchError
from cc_proxy.api import Client, Frame, FrameParser, encode_frame
from cc_proxy.ctl.options import VmSockets
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import ControlParser, encode
from cc_proxy.hyperstart.pacing import FIRST_MARKER, LOSSLESS_WINDOW

_TIMEOUT = 100.0
_READ_SIZE = 256 * 1024
#: Payload bytes of a frame of stdin: as many as the longest frame that the proxy sends to an agent.
_PAYLOAD = 4096 - 12
#: A first process that does nothing, to keep the pod alive.
_FIRST = ("tail", "-f", "/dev/null")


class Host(ABC):
    """Talks to the agent of one VM, from READY on."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @abstractmethod
    def command(self, code: Code, data: object = None) -> None:
        """Send the agent a command, and wait for its acknowledgement. Raises `BenchError` or `Refused`."""

    @abstractmethod
    def run(self, args: tuple[str, ...], stdin: bytes = b"") -> int:
        """Run a process to its end; returns the size of its output. Raises `BenchError` if it fails."""

    def start_pod(self) -> None:
        self.command(Code.START_POD, {"hostname": "bench", "containers": [], "shareDir": ""})
        container = {"id": "pod", "rootfs": "rootfs", "image": "pod", "process": process(1, _FIRST)}
        self.command(Code.NEW_CONTAINER, container)


def process(io_base: int, args: tuple[str, ...]) -> dict[str, Any]:
    streams = {"terminal": False, "stdio": io_base, "stderr": io_base + 1}
    environment = [{"env": "PATH", "value": "/usr/bin:/bin"}]
    return streams | {"args": args, "envs": environment, "workdir": "/"}


class Direct(Host):
    """The yardstick: nothing is between this program and the hypervisor."""

    def __init__(self, sockets: VmSockets) -> None:
        super().__init__()
        self._ctl = self._connect(sockets.ctl)
        self._io = self._connect(sockets.io)
        self._control, self._frames = ControlParser(), FrameParser()
        self._seqs = itertools.count(3, 2)
        self._messages = self._arriving()
        if next(self._messages).code != Code.READY:
            raise BenchError("the VM does not begin with READY")

    def _connect(self, path: str) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(_TIMEOUT)
        sock.connect(path)
        return sock

    def _arriving(self) -> Iterator[Any]:
        while data := self._ctl.recv(_READ_SIZE):
            yield from self._control.receive_data(data)

    def command(self, code: Code, data: object = None) -> None:
        self._ctl.sendall(encode(code, b"" if data is None else msgspec.json.encode(data)))
        answer = next(message for message in self._messages if message.code in (Code.ACK, Code.ERROR))
        if answer.code == Code.ERROR:
            raise BenchError(f"the agent refuses {code.name}")

    def run(self, args: tuple[str, ...], stdin: bytes = b"") -> int:
        seq = next(self._seqs)
        self.command(Code.EXEC_CMD, {"container": "pod", "process": process(seq, args)})
        frames = self._read_frames()
        for start in range(0, len(stdin), LOSSLESS_WINDOW):
            self._io.sendall(b"".join(_pieces(seq, stdin[start : start + LOSSLESS_WINDOW])))
            self._io.sendall(encode_frame(FIRST_MARKER + seq))
            next(frame for frame in frames if frame.seq == FIRST_MARKER + seq)
        self._io.sendall(encode_frame(seq))
        return _output(seq, (frame for frame in frames if frame.seq < FIRST_MARKER))

    def _read_frames(self) -> Iterator[Frame]:
        while data := self._io.recv(_READ_SIZE):
            yield from self._frames.receive_data(data)


class Proxied(Host):
    """What is measured: everything goes through the proxy."""

    def __init__(self, path: str, sockets: VmSockets) -> None:
        super().__init__()
        self.client = self._stack.enter_context(Client(path, timeout=_TIMEOUT))
        self.client.hello("bench", sockets.ctl, sockets.io)
        self._first = self.client.allocate_io(2).fd
        self._stack.callback(os.close, self._first)

    def command(self, code: Code, data: object = None) -> None:
        if data is None:
            self.client.hyper(code.hyper_name)
        else:
            self.client.hyper(code.hyper_name, data)

    def run(self, args: tuple[str, ...], stdin: bytes = b"") -> int:
        io_base, fd = self.client.allocate_io(2)
        with socket.socket(fileno=fd) as io:
            io.settimeout(_TIMEOUT)
            self.command(Code.EXEC_CMD, {"container": "pod", "process": process(io_base, args)})
            io.sendall(b"".join(_pieces(io_base, stdin)) + encode_frame(io_base))
            return _output(io_base, _frames_of(io))


def _frames_of(io: socket.socket) -> Iterator[Frame]:
    parser = FrameParser()
    while data := io.recv(_READ_SIZE):
        yield from parser.receive_data(data)


def _pieces(seq: int, data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _PAYLOAD):
        yield encode_frame(seq, data[start : start + _PAYLOAD])


def _output(seq: int, frames: Iterator[Frame]) -> int:
    """Read frames up to the exit status, which must be 0; returns the size of the output."""
    size = 0
    for frame in frames:
        if frame.seq == seq and not frame.payload:
            status = next(frame for frame in frames if frame.seq == seq).payload
            if status != b"\0":
                raise BenchError(f"a process in the VM ended with status {status!r}")
            return size
        size += len(frame.payload)
    raise BenchError("the VM has gone")
