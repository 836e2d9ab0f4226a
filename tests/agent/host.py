"""The host's side of an embedded agent: raw channels, and a host that talks over them."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from cc_proxy.api.frames import FRAME_HEADER, Frame, encode_frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, ControlMessage, encode
from cc_proxy.hyperstart.pacing import FIRST_MARKER, LOSSLESS

# Seconds. Only a test that fails waits that long.
PATIENCE = 10.0
MARKER = 2**63 + 1

READY = bytes.fromhex("00000008 00000008")
ACK = bytes.fromhex("00000009 00000008")
ERROR = bytes.fromhex("0000000a 00000008")


def next_(*sizes: int) -> bytes:
    """The NEXTs that acknowledge reads of these sizes."""
    return b"".join(bytes.fromhex("0000000e 0000000c") + size.to_bytes(4, "big") for size in sizes)


def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds, of something that nothing announces."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


class Channel:
    """One connection to one of the agent's sockets."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.connect(str(path))
        except BaseException:
            self.sock.close()
            raise

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, size: int) -> bytes:
        """Exactly that many bytes, or fewer before end of file."""
        data = bytearray()
        while len(data) < size and (piece := self.sock.recv(size - len(data))):
            data += piece
        return bytes(data)

    def rest(self) -> bytes:
        """Everything up to end of file."""
        return b"".join(iter(lambda: self.sock.recv(65536), b""))

    @property
    def silent(self) -> bool:
        """Whether there is nothing to read now, end of file included."""
        return not select.select([self.sock], [], [], 0)[0]

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def process(*args: str, stdio: int = 1, stderr: int = 2, **more: Any) -> dict[str, Any]:
    """A process as commands describe it."""
    return {"terminal": False, "stdio": stdio, "stderr": stderr, "args": list(args), **more}


class Host:
    """Both channels to an agent, and the commands one sends over them."""

    def __init__(self, ctl: Path, io: Path) -> None:
        with ExitStack() as made:
            self.ctl = made.enter_context(Channel(ctl))
            self.io = made.enter_context(Channel(io))
            self._made = made.pop_all()
        #: What a marker comes back with.
        self.echo = b""
        #: What came on the control channel and was neither NEXT nor an answer.
        self.events: list[ControlMessage] = []

    # Control channel

    def read_message(self) -> ControlMessage:
        code, length = HEADER.unpack(self.ctl.read(HEADER.size))
        return ControlMessage(code, self.ctl.read(length - HEADER.size))

    def wait_ready(self) -> None:
        assert self.read_message().code == Code.READY

    def wait_lossless(self) -> None:
        """Waits until the agent has said that it is lossless."""
        self.echo = LOSSLESS
        assert self.read_frame() == Frame(FIRST_MARKER, LOSSLESS)

    def send(self, code: Code, data: Any = b"") -> None:
        payload = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.ctl.send(encode(code, payload))

    def answer(self) -> ControlMessage:
        while True:
            message = self.read_message()
            if message.code in (Code.ACK, Code.ERROR):
                return message
            if message.code != Code.NEXT:
                self.events.append(message)

    def ask(self, code: Code, data: Any = b"") -> ControlMessage:
        self.send(code, data)
        return self.answer()

    def ok(self, code: Code, data: Any = b"") -> bytes:
        """Sends a command that has to be acknowledged; returns what the ACK carries."""
        answer = self.ask(code, data)
        assert answer.code == Code.ACK, (code, data)
        return answer.payload

    def refused(self, code: Code, data: Any = b"") -> None:
        """Sends a command that has to be answered with ERROR."""
        assert self.ask(code, data) == ControlMessage(Code.ERROR), (code, data)

    def start_pod(self) -> None:
        self.ok(Code.START_POD, {"hostname": "h", "containers": [], "shareDir": "rootfs"})

    def start(self, *args: str, container: str = "c", **more: Any) -> None:
        """Starts a container, seqs 1 and 2 unless others are given."""
        self.ok(Code.NEW_CONTAINER, {"id": container, "process": process(*args, **more)})

    def exec(self, *args: str, container: str = "c", **more: Any) -> None:
        self.ok(Code.EXEC_CMD, {"container": container, "process": process(*args, **more)})

    def kill(self, number: int, container: str = "c", **more: Any) -> None:
        self.ok(Code.KILL_CONTAINER, {"container": container, "signal": number, **more})

    # I/O channel

    def feed(self, seq: int, payload: bytes = b"") -> None:
        self.io.send(encode_frame(seq, payload))

    def read_frame(self) -> Frame:
        seq, length = FRAME_HEADER.unpack(self.io.read(FRAME_HEADER.size))
        return Frame(seq, self.io.read(length - FRAME_HEADER.size))

    def read_until(self, seq: int, wanted: bytes) -> None:
        """Reads frames of one seq, and no others, until what they carried ends so."""
        got = b""
        while not got.endswith(wanted):
            frame = self.read_frame()
            assert frame.seq == seq
            assert frame.payload, f"the end, after {got!r}"
            got += frame.payload

    def run_to_end(self, seq: int = 1) -> tuple[dict[int, bytes], int]:
        """Reads until the process on `seq` has ended; returns what came on each seq, and the exit status."""
        output: dict[int, bytearray] = {}
        while True:
            frame = self.read_frame()
            if frame.seq == seq and not frame.payload:
                last = self.read_frame()
                assert last.seq == seq
                return {key: bytes(value) for key, value in output.items()}, last.payload[0]
            output.setdefault(frame.seq, bytearray()).extend(frame.payload)

    def fence(self, marker: int = MARKER) -> None:
        """Returns once the agent has handled every frame before; nothing else must have come from it."""
        self.feed(marker)
        assert self.read_frame() == Frame(marker, self.echo)

    def feed_all(self, seq: int, data: bytes) -> None:
        """Sends stdin so that nothing of it is lost."""
        for start in range(0, len(data), 512):
            self.feed(seq, data[start : start + 512])
            self.fence()

    def close(self) -> None:
        self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def connected(ctl: Path, io: Path) -> Iterator[Host]:
    """A host that has met READY and started a pod."""
    with Host(ctl, io) as host:
        host.wait_ready()
        host.start_pod()
        yield host


def state_of(pid: int) -> str:
    """The state of a process, as in ps; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def named(name: str) -> list[int]:
    """The children of this process that run a program of this name, and those that did and are zombies."""
    return [pid for pid in children_of(os.getpid()) if _name_of(pid) == name]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def written_by(pid: int) -> int:
    """Bytes that a process has written so far."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["wchar"])


def children_of(pid: int) -> list[int]:
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(name))
    return found
