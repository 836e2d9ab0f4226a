"""VMs that want all of a daemon, and their clients: what `bench.attack` does for some habits."""

import os
import select
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec

from bench.vms import MESSAGE, READY, listen
from cc_proxy.api import Client, Hello, Hyper, Request
from cc_proxy.api.frames import encode_frame
from cc_proxy.api.messages import encode
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.pacing import FIRST_MARKER

_READ_SIZE = 256 * 1024
#: Frames, or messages, that are sent over and over: many a socket's fill.
_ROUND = 4_096
_TIMEOUT = 30.0
#: Bytes of an event that takes its time.
_LONG = 10_000_000


def _strays(first: int) -> bytes:
    """Frames on seqs that nobody has, no two neighbours alike."""
    return b"".join(encode_frame(first + number % 7, b"x" * (number % 2)) for number in range(_ROUND))


def _output(seq: int) -> bytes:
    return b"".join(encode_frame(seq, b"x" * (number % 3)) for number in range(_ROUND))


def _bytes(seq: int) -> bytes:
    return encode_frame(seq, b"x") * _ROUND


def _stdin(seq: int) -> bytes:
    """Frames of which no two neighbours are alike."""
    return b"".join(encode_frame(seq, b"x" * (1 + number % 2)) for number in range(_ROUND))


_EVENTS = MESSAGE.pack(Code.NEXT, MESSAGE.size) * _ROUND
_LONG_EVENT = MESSAGE.pack(Code.NEXT, _LONG) + bytes(_LONG - MESSAGE.size)

#: Who says something, and what, of a VM whose client has that stream.
HABITS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "strays": ("io", lambda _: _strays(1_000_000)),
    "markers": ("io", lambda _: _strays(FIRST_MARKER + 1_000_000)),
    "output": ("io", _output),
    "bytes": ("io", _bytes),
    "stdin": ("client", _stdin),
    "events": ("control", lambda _: _EVENTS),
    "long-events": ("control", lambda _: _LONG_EVENT),
}


class Vm:
    """One of them, and its client: both read as fast as they can."""

    def __init__(self, proxy: str, directory: str, number: int, habit: str) -> None:
        paths = [f"{directory}/vm{number}.{channel}" for channel in ("ctl", "io")]
        listeners = [listen(path) for path in paths]
        asking = socket.socket(socket.AF_UNIX)
        asking.connect(proxy)
        hello = Hello(f"hostile-{number}", *paths)
        asking.sendall(encode(Request(hello.NAME, msgspec.Raw(msgspec.json.encode(hello)))))
        self._control, self._io = (listener.accept()[0] for listener in listeners)
        self._control.sendall(READY)
        asking.recv(_READ_SIZE)
        self._client = Client(asking, timeout=_TIMEOUT)
        seq, fd = self._client.allocate_io(1)
        self._stream = socket.socket(fileno=fd)
        who, says = HABITS[habit]
        self._said = says(seq)
        self._left = memoryview(self._said)
        self._sender = {"io": self._io, "control": self._control, "client": self._stream}[who]
        self._reader = self._io if who == "client" else self._stream
        if habit == "long-events":  # so that there is somebody who reads on and on
            ping = msgspec.json.encode(Hyper("ping"))
            asking.sendall(encode(Request(Hyper.NAME, msgspec.Raw(ping))))

    def watched(self) -> Iterator[tuple[socket.socket, int, Callable[[], None]]]:
        """Yield what is to be done when something is ready."""
        yield self._sender, select.EPOLLOUT, self._send
        yield self._reader, select.EPOLLIN, self._receive

    def _send(self) -> None:
        with suppress(BlockingIOError):
            self._left = self._left[self._sender.send(self._left, socket.MSG_DONTWAIT) :]
            if not self._left:
                self._left = memoryview(self._said)

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            self._reader.recv(_READ_SIZE, socket.MSG_DONTWAIT)


def attack(proxy: str, habit: str, count: int) -> None:
    """Have so many VMs, each of which does what the habit says."""
    directory = tempfile.mkdtemp(prefix="cc-proxy-hostile-")
    vms = [Vm(proxy, directory, number, habit) for number in range(count)]
    for name in os.listdir(directory):
        os.unlink(f"{directory}/{name}")
    os.rmdir(directory)
    epoll = select.epoll()
    handlers = {}
    for vm in vms:
        for sock, events, handler in vm.watched():
            epoll.register(sock, events)
            handlers[sock.fileno()] = handler
    while True:
        for fd, _ in epoll.poll():
            handlers[fd]()
