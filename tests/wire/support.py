"""Raw clients and scripted VMs, with their own reading of the wire."""

from __future__ import annotations

import array
import fcntl
import json
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# What is bound to happen gets this long, in seconds. Only a test that fails waits for it.
WAIT = 10.0

MIB = 1_048_576
# Empty frames from here on ask the agent whether it took the stdin sent before.
MARKER = 2**63

COMMAND = struct.Struct(">II")
FRAME = struct.Struct(">QI")

OK = b'{"success":true}'
VERSIONED = b'{"success":true,"data":{"version":1}}'
NOT_ATTACHED = b'{"success":false,"error":"client not attached to a vm"}'
HYPERSTART_ERROR = b'{"success":false,"error":"ERROR received from Hyperstart"}'

# Codes that the scripts of the tests need; test_hyper.py has the table.
GETVERSION, EXECCMD, FINISHCMD, READY, ACK, ERROR, PING = 0, 6, 7, 8, 9, 10, 12
FINISHPOD, NEXT, ASYNC_EVENT = 13, 14, 23

# An agent that says no READY is asked this many questions at once; it answers `version` with this number.
QUESTIONS = 16
VERSION_NUMBER = b"\0\0\x10\x92"

_ROOM_FOR_FDS = socket.CMSG_SPACE(8 * 4)


class Command(NamedTuple):
    """A message of the control channel."""

    code: int
    payload: bytes


class Frame(NamedTuple):
    """A frame of the I/O channel."""

    seq: int
    payload: bytes


def message(text: bytes | str, *, length: int | None = None, reserved: int = 0) -> bytes:
    """A client message; `length` is what its header claims."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">II", len(data) if length is None else length, reserved) + data


def request(name: str, data: object = None) -> bytes:
    """A request, without `data` if that is None."""
    return message(json.dumps({"id": name} if data is None else {"id": name, "data": data}))


def refused(text: str) -> bytes:
    """The response that carries this error."""
    return json.dumps({"success": False, "error": text}, separators=(",", ":"), ensure_ascii=False).encode()


def error_of(response: bytes) -> str:
    """The text of a response that has to be a refusal which the clients in the field can take."""
    assert len(response) <= 1024
    answer = json.loads(response)
    assert answer["success"] is False
    error = answer["error"]
    assert isinstance(error, str)
    assert error
    return error


def command(code: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A control message; `length` is what its header claims."""
    return COMMAND.pack(code, COMMAND.size + len(payload) if length is None else length) + payload


def frame(seq: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """An I/O frame; `length` is what its header claims."""
    return FRAME.pack(seq, FRAME.size + len(payload) if length is None else length) + payload


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT) -> None:
    """For what leaves no trace on a socket of the test's own."""
    deadline = time.monotonic() + seconds
    never = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        never.wait(0.005)


def read_exact(sock: socket.socket, size: int) -> bytes:
    """Reads that much and not a byte more."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"end of file after {len(data)} of {size} bytes: {bytes(data[:100])!r}"
        data += piece
    return bytes(data)


def is_silent(sock: socket.socket) -> bool:
    """Nothing to read now, not even the end."""
    return not select.select([sock], [], [], 0)[0]


def unread_by_peer(sock: socket.socket) -> int:
    """Bytes of memory that what was sent, and not yet read, takes."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def at_end(sock: socket.socket) -> bool:
    """The peer has hung up, and everything before was read. A reset is no clean end."""
    return sock.recv(1) == b""


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cuts without regard to anything."""
    return (data[start : start + size] for start in range(0, len(data), size))


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Runs `work` meanwhile, and raises at the end what it raised."""
    trouble: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(3 * WAIT)
    assert not thread.is_alive()
    if trouble:
        raise trouble[0]


class Stream:
    """A client's I/O fd."""

    def __init__(self, sock: socket.socket, base: int) -> None:
        self.sock = sock
        self.base = base
        sock.settimeout(WAIT)

    def send(self, payload: bytes = b"") -> None:
        self.sock.sendall(frame(self.base, payload))

    def read_frame(self) -> Frame:
        seq, length = FRAME.unpack(read_exact(self.sock, FRAME.size))
        return Frame(seq, read_exact(self.sock, length - FRAME.size))

    def at_end(self) -> bool:
        return at_end(self.sock)

    def close(self) -> None:
        self.sock.close()


class RawClient:
    """A client of the daemon that sends bytes and takes what comes, exactly."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self._streams: list[Stream] = []
        try:
            self.sock.settimeout(WAIT)
            self.sock.connect(str(path))
        except BaseException:
            self.sock.close()
            raise

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> bytes:
        """The text of one response. No fd may travel with it."""
        length, reserved = struct.unpack(">II", self._read(8))
        assert reserved == 0
        assert length <= MIB
        return self._read(length)

    def ask(self, name: str, data: object = None) -> bytes:
        self.send(request(name, data))
        return self.receive()

    def hello(self, container: str, vm: FakeVm) -> None:
        """Says hello and does not wait for the response."""
        self.send(request("hello", hello_data(container, vm)))

    def attach(self, container: str) -> bytes:
        return self.ask("attach", {"containerId": container})

    def bye(self, container: str) -> bytes:
        return self.ask("bye", {"containerId": container})

    def hyper(self, name: str = "ping", data: str | None = None) -> None:
        """Asks for a command, `data` in the client's own spelling, and does not wait for the response."""
        arguments = f'"hyperName":"{name}"' + ("" if data is None else f',"data":{data}')
        self.send(message(f'{{"id":"hyper","data":{{{arguments}}}}}'))

    def receive_fd(self, base: int) -> Stream:
        """Takes the one byte `F` and the one fd that follow the response to allocateIO."""
        data, ancillary, flags, _ = self.sock.recvmsg(64, _ROOM_FOR_FDS)
        fds = _fds_of(ancillary)
        sockets = [socket.socket(fileno=fd) for fd in fds]
        streams = [Stream(sock, base) for sock in sockets]
        self._streams += streams
        assert data == b"F"
        assert len(streams) == 1
        assert not flags & socket.MSG_CTRUNC
        return streams[0]

    def receive_io(self) -> Stream:
        """Takes the response to allocateIO and its fd."""
        response = self.receive()
        base = json.loads(response)["data"]["ioBase"]
        assert response == b'{"success":true,"data":{"ioBase":%d}}' % base
        return self.receive_fd(base)

    def allocate(self, streams: int = 2) -> Stream:
        self.send(request("allocateIO", {"nStreams": streams}))
        return self.receive_io()

    def is_closed_unanswered(self) -> bool:
        """The daemon hung up and sent nothing. What it left unread makes that a reset."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()

    def close_all(self) -> None:
        self.close()
        for stream in self._streams:
            stream.close()

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece, ancillary, _, _ = self.sock.recvmsg(size - len(data), _ROOM_FOR_FDS)
            fds = _fds_of(ancillary)
            for fd in fds:
                socket.close(fd)
            assert not fds, "an fd came with a response"
            assert piece, f"end of file after {len(data)} of {size} bytes of a response: {bytes(data)!r}"
            data += piece
        return bytes(data)


class FakeVm:
    """The two sockets of a VM, with an agent that does what the test says, step by step."""

    def __init__(self, directory: Path, name: str) -> None:
        self.ctl_path = directory / f"{name}.ctl"
        self.io_path = directory / f"{name}.io"
        self.listeners = [listen_at(self.ctl_path), listen_at(self.io_path)]
        self._ctl: socket.socket | None = None
        self._io: socket.socket | None = None

    @property
    def ctl(self) -> socket.socket:
        assert self._ctl
        return self._ctl

    @property
    def io(self) -> socket.socket:
        assert self._io
        return self._io

    def listen_again(self) -> None:
        for path in (self.ctl_path, self.io_path):
            path.unlink(missing_ok=True)
        self.listeners = [listen_at(self.ctl_path), listen_at(self.io_path)]

    def accept(self) -> None:
        self._ctl, self._io = (listener.accept()[0] for listener in self.listeners)
        self._ctl.settimeout(WAIT)
        self._io.settimeout(WAIT)

    def was_not_dialled(self) -> bool:
        return all(is_silent(listener) for listener in self.listeners)

    def say(self, code: int, payload: bytes = b"") -> None:
        self.ctl.sendall(command(code, payload))

    def read_command(self) -> Command:
        code, length = COMMAND.unpack(read_exact(self.ctl, COMMAND.size))
        assert COMMAND.size <= length <= 10_240
        return Command(code, read_exact(self.ctl, length - COMMAND.size))

    def acknowledge(self, payload: bytes = b"") -> Command:
        """Takes a command and acknowledges it. The daemon's own may be in front of what a test waits for."""
        taken = self.read_command()
        self.say(ACK, payload or (VERSION_NUMBER if taken.code == GETVERSION else b""))
        return taken

    def answer_questions(self, number: int = QUESTIONS) -> None:
        """Answers as an agent that has been up for long."""
        for _ in range(number):
            self.say(ACK, VERSION_NUMBER if self.read_command().code == GETVERSION else b"")

    def send_frame(self, seq: int, payload: bytes = b"") -> None:
        self.io.sendall(frame(seq, payload))

    def read_frame(self) -> Frame:
        """The next frame, of a size that does not end the agent."""
        seq, length = FRAME.unpack(read_exact(self.io, FRAME.size))
        assert FRAME.size <= length <= 4_096
        return Frame(seq, read_exact(self.io, length - FRAME.size))

    def next_frame(self) -> Frame:
        """The next frame of a client. Markers are sent back, as hyperstart does with what nobody owns."""
        while (taken := self.read_frame()).seq >= MARKER:
            assert taken.payload == b""
            self.send_frame(taken.seq)
        return taken

    def take_stdin(self, base: int, size: int) -> bytes:
        """That much stdin of one stream, in whatever frames."""
        data = bytearray()
        while len(data) < size:
            seq, payload = self.next_frame()
            assert seq == base
            data += payload
        assert len(data) == size
        return bytes(data)

    def hang_up(self) -> None:
        """What closing QEMU's ends looks like from outside: whatever it did not read is gone."""
        for sock in (self._ctl, self._io):
            if sock:
                sock.close()

    def is_hung_up(self) -> bool:
        """The daemon closed both its ends."""
        return at_end(self.ctl) and at_end(self.io)

    def close(self) -> None:
        self.hang_up()
        for listener in self.listeners:
            listener.close()


def hello_data(container: str, vm: FakeVm) -> dict[str, object]:
    return {"containerId": container, "ctlSerial": str(vm.ctl_path), "ioSerial": str(vm.io_path)}


def listen_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(WAIT)
    listener.bind(str(path))
    listener.listen()
    return listener


def _fds_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()
