"""VMs that want all of a daemon, and their clients: the habits of `bench.attack` that need VMs."""

import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec

from bench.vms import ACK, MESSAGE, READY, listen
from cc_proxy.api import Bye, Client, Hello, Hyper, Request
from cc_proxy.api.frames import encode_frame
from cc_proxy.api.messages import encode
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.pacing import FIRST_MARKER

_READ_SIZE = 256 * 1024
#: How many frames or messages are sent over and over.
_ROUND = 4_096
_TIMEOUT = 30.0
#: Bytes of a long event.
_LONG = 10_000_000


def _strays(first: int) -> bytes:
    """Return frames on seqs that no client has. No two neighbours are alike."""
    return b"".join(encode_frame(first + number % 7, b"x" * (number % 2)) for number in range(_ROUND))


def _output(seq: int) -> bytes:
    return b"".join(encode_frame(seq, b"x" * (number % 3)) for number in range(_ROUND))


def _bytes(seq: int) -> bytes:
    return encode_frame(seq, b"x") * _ROUND


def _stdin(seq: int) -> bytes:
    """Return frames of stdin. No two neighbours are alike."""
    return b"".join(encode_frame(seq, b"x" * (1 + number % 2)) for number in range(_ROUND))


_EVENTS = MESSAGE.pack(Code.NEXT, MESSAGE.size) * _ROUND
_LONG_EVENT = MESSAGE.pack(Code.NEXT, _LONG) + bytes(_LONG - MESSAGE.size)

#: By habit: who sends, and a function that makes what is sent from the seq of the client's stream.
_SAID: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "strays": ("io", lambda _: _strays(1_000_000)),
    "markers": ("io", lambda _: _strays(FIRST_MARKER + 1_000_000)),
    "output": ("io", _output),
    "bytes": ("io", _bytes),
    "stdin": ("client", _stdin),
    "events": ("control", lambda _: _EVENTS),
    "long-events": ("control", lambda _: _LONG_EVENT),
}


class Vm:
    """One VM, and the client that says hello for it."""

    def __init__(self, proxy: str, directory: str, number: int) -> None:
        self._name = f"hostile-{number}"
        self._paths = [f"{directory}/vm{number}.{channel}" for channel in ("ctl", "io")]
        self._listeners = [listen(path) for path in self._paths]
        self.asking = socket.socket(socket.AF_UNIX)
        self.asking.connect(proxy)
        self._say_hello()
        self.client = Client(self.asking, timeout=_TIMEOUT)

    def _say_hello(self) -> None:
        self._ask(Hello(self._name, *self._paths))
        self.control, self.io = (listener.accept()[0] for listener in self._listeners)
        self.control.sendall(READY)
        self.asking.recv(_READ_SIZE)

    def _ask(self, payload: Hello | Bye | Hyper) -> None:
        self.asking.sendall(encode(Request(payload.NAME, msgspec.Raw(msgspec.json.encode(payload)))))

    def ping(self) -> None:
        """Have the client wait for the agent, which does not answer."""
        self._ask(Hyper("ping"))

    def start_process(self, seq: int) -> None:
        self._ask(Hyper("execcmd", msgspec.Raw(b'{"process":{"stdio":%d}}' % seq)))
        self.control.recv(_READ_SIZE)
        self.control.sendall(ACK)
        self.asking.recv(_READ_SIZE)

    def open_stream(self) -> None:
        _, fd = self.client.allocate_io(2)
        os.close(fd)

    def ask_status(self) -> None:
        self.client.status()

    def go_and_come(self) -> None:
        self._ask(Bye(self._name))
        self.asking.recv(_READ_SIZE)
        self.control.close()
        self.io.close()
        self._say_hello()


#: What the client of each VM does over and over.
_DONE: dict[str, Callable[[Vm], None]] = {
    "vms": Vm.go_and_come,
    "streams": Vm.open_stream,
    "status": Vm.ask_status,
}

#: How many VMs each habit has.
HABITS = {**dict.fromkeys([*_SAID, *_DONE], 8), "status": 60}


class Sender:
    """One end that sends the same over and over, and the end that reads it: both as fast as they can."""

    def __init__(self, vm: Vm, habit: str) -> None:
        seq, fd = vm.client.allocate_io(1)
        stream = socket.socket(fileno=fd)
        vm.start_process(seq)
        who, says = _SAID[habit]
        self._said = says(seq)
        self._left = memoryview(self._said)
        self._sender = {"io": vm.io, "control": vm.control, "client": stream}[who]
        self._reader = vm.io if who == "client" else stream
        if habit == "long-events":  # the daemon reads on and on only while a command waits for its answer
            vm.ping()

    def watched(self) -> Iterator[tuple[socket.socket, int, Callable[[], None]]]:
        """Yield each socket with the events to watch it for, and what to call then."""
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


def attack(proxy: str, directory: str, habit: str) -> None:
    """Have VMs that follow the habit. Returns only if their clients fail."""
    directory = tempfile.mkdtemp(dir=directory)
    vms = [Vm(proxy, directory, number) for number in range(HABITS[habit])]
    if habit in _DONE:
        _do(vms, _DONE[habit])
    else:
        _say([Sender(vm, habit) for vm in vms])


def _do(vms: list[Vm], done: Callable[[Vm], None]) -> None:
    def repeat(vm: Vm) -> None:
        while True:
            done(vm)

    threads = [threading.Thread(target=repeat, args=[vm], name="client") for vm in vms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _say(senders: list[Sender]) -> None:
    epoll = select.epoll()
    handlers = {}
    for sender in senders:
        for sock, events, handler in sender.watched():
            epoll.register(sock, events)
            handlers[sock.fileno()] = handler
    while True:
        for fd, _ in epoll.poll():
            handlers[fd]()
