"""A proxy that answers as it is told, and whose VM's process is a function of the test."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from cc_proxy.api import (
    AllocateIoResult,
    Frame,
    FrameParser,
    Request,
    Response,
    Version,
    encode_frame,
    read_message,
    write_fd,
    write_message,
)
from cc_proxy.api.messages import MAX_STATUS, encode

ERROR = "ERROR received from Hyperstart"
_PATIENCE = 20.0


class Asked(NamedTuple):
    """A request. `hyper` goes by the name of the agent's command, and `data` is that one's."""

    name: str
    data: bytes

    @property
    def arguments(self) -> Any:
        return msgspec.json.decode(self.data)


class FakeProcess:
    """The VM's end of the streams of one process."""

    def __init__(self, proxy: FakeProxy, io: socket.socket, io_base: int, asked: Asked) -> None:
        self.proxy = proxy
        self.io = io
        self.io_base = io_base
        self.asked = asked
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    def out(self, data: bytes) -> None:
        self.send(encode_frame(self.io_base, data))

    def err(self, data: bytes) -> None:
        self.send(encode_frame(self.io_base + 1, data))

    def exit(self, status: int) -> None:
        self.send(encode_frame(self.io_base) + encode_frame(self.io_base, bytes([status])))

    def send(self, data: bytes) -> None:
        self.io.sendall(data, socket.MSG_NOSIGNAL)

    def receive(self) -> Frame:
        """Return the next frame of stdin. Raises `EOFError` if there is none any more."""
        while not self._frames:
            data = self.io.recv(65536)
            if not data:
                raise EOFError
            self._frames = self._parser.receive_data(data)
        return self._frames.pop(0)

    def stdin(self) -> bytes:
        """Return all of stdin."""
        pieces = []
        while payload := self.receive().payload:
            pieces.append(payload)
        return b"".join(pieces)


Script = Callable[[FakeProcess], None]


def exits(status: int) -> Script:
    return lambda process: process.exit(status)


def succeeds(process: FakeProcess) -> None:
    process.exit(0)


class FakeProxy:
    """Listens at `path`. Every request succeeds, unless one of the tables says otherwise.

    `script` runs in a thread of its own for each process that is started.
    """

    def __init__(self, path: Path, script: Script = succeeds) -> None:
        self.path = str(path)
        self.script = script
        #: Requests by name, and the error they are answered with.
        self.refused: dict[str, str] = {}
        #: Requests by name, and what they return.
        self.results: dict[str, object] = {}
        #: Requests that are answered once the event is set; and only recorded until then.
        self.held: dict[str, threading.Event] = {}
        #: What is done when a request of that name has come, before it is answered.
        self.when_asked: dict[str, Callable[[], None]] = {}
        #: Whether a process is through with its script before the command that starts it is answered.
        self.process_first = False
        #: Requests on which the connection is closed.
        self.hangs_up_on: set[str] = set()
        #: The number of the first stream.
        self.io_base = 1
        self.asked: list[Asked] = []
        self._news = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self._closing = False
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        self._listener.bind(self.path)
        self._listener.listen()
        self._start_thread(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        for thread in self._threads:
            thread.join(_PATIENCE)
        for sock in self._sockets:
            sock.close()
        os.unlink(self.path)
        if self._failures and kind is None:
            raise self._failures[0]

    @property
    def names(self) -> list[str]:
        """The requests so far."""
        with self._news:
            return [asked.name for asked in self.asked]

    def hold(self, name: str) -> threading.Event:
        """Keep requests of that name without an answer until the event is set."""
        self.held[name] = threading.Event()
        return self.held[name]

    def wait_for(self, name: str, count: int = 1) -> Asked:
        """Return the `count`-th request of that name, once it has come."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._named(name)) >= count, _PATIENCE), self.asked
            return self._named(name)[count - 1]

    def record(self, name: str) -> None:
        """Have `wait_for` find something that was no request."""
        with self._news:
            self.asked.append(Asked(name, b""))
            self._news.notify_all()

    def names_but(self, *events: str) -> list[str]:
        """The requests so far, without what was only recorded."""
        return [name for name in self.names if name not in events]

    def hang_up(self) -> None:
        """Close all, as a proxy that ends does."""
        self._closing = True
        for event in self.held.values():
            event.set()
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _named(self, name: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.name == name]

    def _start_thread(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=self._guarded, args=(target, *args))
        self._threads.append(thread)
        thread.start()

    def _guarded(self, target: Callable[..., None], *args: object) -> None:
        """A client that goes away is none of the failures the test should hear of."""
        try:
            target(*args)
        except (EOFError, OSError):
            pass
        except BaseException as error:
            self._failures.append(error)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            self._sockets.append(sock)
            self._start_thread(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            ends: list[socket.socket] = []
            while (request := read_message(sock, Request)) is not None:
                asked = self._note(request)
                self.when_asked.get(asked.name, _nothing)()
                if event := self.held.get(asked.name):
                    event.wait(_PATIENCE)
                if asked.name in self.hangs_up_on:
                    return
                if error := self.refused.get(asked.name):
                    write_message(sock, Response(False, error))
                else:
                    self._carry_out(sock, asked, ends)

    def _note(self, request: Request) -> Asked:
        assert isinstance(request.data, msgspec.Raw)
        data = bytes(request.data)
        asked = Asked(request.id, data)
        if request.id == "hyper":
            arguments = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            name = msgspec.json.decode(arguments["hyperName"], type=str)
            asked = Asked(name, bytes(arguments.get("data", b"")))
        with self._news:
            self.asked.append(asked)
            self._news.notify_all()
        return asked

    def _carry_out(self, sock: socket.socket, asked: Asked, ends: list[socket.socket]) -> None:
        if asked.name == "allocateIO":
            self._allocate_io(sock, ends)
            return
        if asked.name in ("newcontainer", "execcmd"):
            self._start_process(ends.pop(0), asked)
        if asked.name in ("hello", "attach"):
            write_message(sock, Response(True, data=msgspec.Raw(msgspec.json.encode(Version(1)))))
        elif asked.name in self.results:
            text = msgspec.json.encode(self.results[asked.name])
            sock.sendall(encode(Response(True, data=msgspec.Raw(text)), MAX_STATUS))
        else:
            write_message(sock, Response(True))

    def _allocate_io(self, sock: socket.socket, ends: list[socket.socket]) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        result = msgspec.Raw(msgspec.json.encode(AllocateIoResult(self.io_base)))
        with theirs:
            write_message(sock, Response(True, data=result))
            write_fd(sock, theirs.fileno())
        ends.append(ours)

    def _start_process(self, io: socket.socket, asked: Asked) -> None:
        process = FakeProcess(self, io, self.io_base, asked)
        if self.process_first:
            self.script(process)
        else:
            self._start_thread(self.script, process)


def _nothing() -> None:
    pass
