"""The clients: one process plays all of them."""

import os
import socket
import time
from collections.abc import Callable
from itertools import count

import msgspec

from bench.figures import latencies
from bench.flow import End, Generator, StalledError, make_blocking, receive_some
from bench.relay import destination
from bench.streams import NEIGHBOUR_FRAMES, NEIGHBOUR_PAYLOAD, WrongBytesError, payload_of
from bench.worker import serve
from cc_proxy.api import Attach, Client, Hyper, Payload, Request, Response, encode_frame
from cc_proxy.api.messages import encode

_ECHO_PAYLOAD = 64
#: Seconds of round trips that do not count, before those that do.
_WARM_UP = 0.03
_TIMEOUT = 30.0
#: Seconds between two rounds of echoes in `echo_on`: like a client that types fast, and hardly any load.
_BETWEEN_ECHOES = 0.002

_VERSIONED = encode(Response(success=True, data=msgspec.Raw(b'{"version":1}')))
_DONE = encode(Response(success=True))


class Clients(Generator):
    """`ends` are the clients' ends of their I/O fds. The public methods are orders (`bench.worker`)."""

    def __init__(self) -> None:
        super().__init__()
        self._proxy = ""
        self._registered: list[str] = []
        self._clients: list[Client] = []
        # The same connections as sockets, for what is timed.
        self._sockets: list[socket.socket] = []

    def hello(self, proxy: str, vms: dict[str, list[str]]) -> None:
        """Register VMs, each over a connection of its own. `vms` has their sockets, by container id."""
        self._proxy = proxy
        for container, (control, io) in vms.items():
            self._connect().hello(container, control, io)
            self._registered.append(container)

    def attach(self, proxy: str, containers: list[str], connections: int) -> None:
        """Attach this many connections, taking the containers in turn."""
        self._proxy = proxy
        for number in range(connections):
            self._connect().attach(containers[number % len(containers)])

    def allocate(self, vms: int) -> list[list[int]]:
        """Allocate a stream for each connection that `attach` made, and start a process on it.

        Returns the streams of each VM. `Vms.start` must acknowledge the commands meanwhile.
        """
        streams: list[list[int]] = [[] for _ in range(vms)]
        for number, client in enumerate(self._clients[len(self._registered) :]):
            seq, fd = client.allocate_io(1)
            client.hyper("execcmd", {"process": {"stdio": seq}})
            vm = number % vms
            self.ends.append(End(socket.socket(fileno=fd), vm, (seq,)))
            streams[vm].append(seq)
        return streams

    def connect_relay(self, relay: str, streams: list[list[int]], destinations: list[str]) -> None:
        """Connect to each VM's I/O channel through the relay."""
        for vm, (seqs, path) in enumerate(zip(streams, destinations, strict=True)):
            sock = make_blocking(socket.socket(socket.AF_UNIX))
            sock.connect(relay)
            sock.sendall(destination(path))
            self.ends.append(End(sock, vm, tuple(seqs)))

    def echo(self, seconds: float) -> dict[str, float]:
        """Time echoes of one frame over the first end, then send end of file; returns `latencies`."""
        end = self.ends[0]
        sock = make_blocking(end.sock)
        seq = end.seqs[0]
        number = 0

        def once() -> int:
            nonlocal number
            number += 1
            frame = encode_frame(seq, payload_of(end.vm, seq, number, _ECHO_PAYLOAD))
            return _round_trip(sock, frame, frame)

        found = _timed(once, seconds)
        sock.sendall(encode_frame(seq))
        return found

    def echo_on(self, echoes: int, until: str) -> list[tuple[float, list[float]]]:
        """Send rounds of echoes over the first `echoes` ends, until the file `until` exists.

        Returns for each round when it began (`time.monotonic`), and the seconds that each echo took.
        """
        ends = [(make_blocking(end.sock), end) for end in self.ends[:echoes]]
        found = []
        for number in count():
            frames = [
                (sock, encode_frame(end.seqs[0], payload_of(end.vm, end.seqs[0], number, _ECHO_PAYLOAD)))
                for sock, end in ends
            ]
            begun = time.monotonic()
            for sock, frame in frames:
                sock.sendall(frame)
            found.append((begun, [_come_back(sock, frame) - begun for sock, frame in frames]))
            if os.path.exists(until):
                break
            time.sleep(_BETWEEN_ECHOES)
        for sock, end in ends:
            sock.sendall(encode_frame(end.seqs[0]))
        return found

    def receive_neighbour(self, cycles: int) -> None:
        """Receive what `Vms.echo_beside` sends."""
        self.prepare(NEIGHBOUR_PAYLOAD, NEIGHBOUR_FRAMES)
        self.receive(cycles)

    def time_attach(self, container: str, seconds: float) -> dict[str, float]:
        question = _request(Attach(container))
        return _timed(lambda: _round_trip(self._sockets[-1], question, _VERSIONED), seconds)

    def time_ping(self, seconds: float) -> dict[str, float]:
        """Time pings. Another command then tells the VM that they are over."""
        question = _request(Hyper("ping"))
        found = _timed(lambda: _round_trip(self._sockets[-1], question, _DONE), seconds)
        _round_trip(self._sockets[-1], _request(Hyper("version")), _DONE)
        return found

    def time_hop(self, path: str, container: str, seconds: float) -> dict[str, float]:
        """Time what an attach takes if the other side only sends it back."""
        question = _request(Attach(container))
        with _connected(path) as sock:
            found = _timed(lambda: _round_trip(sock, question, question), seconds)
        _connected(path).close()
        return found

    def time_connections(self, container: str, seconds: float) -> dict[str, float]:
        """Time each connect, attach and close."""
        question = _request(Attach(container))
        return _timed(lambda: _connection(self._proxy, question, _VERSIONED), seconds)

    def time_hop_connections(self, path: str, container: str, seconds: float) -> dict[str, float]:
        """Time each connect, hop and close."""
        question = _request(Attach(container))
        found = _timed(lambda: _connection(path, question, question), seconds)
        _connected(path).close()
        return found

    def close(self) -> None:
        """Unregister the VMs, and hang up."""
        for client, container in zip(self._clients, self._registered, strict=False):
            client.bye(container)
        self.close_ends()
        for client in self._clients:
            client.close()
        self._registered.clear()
        self._clients.clear()
        self._sockets.clear()

    def _connect(self) -> Client:
        sock = _connected(self._proxy)
        self._sockets.append(sock)
        client = Client(sock, timeout=_TIMEOUT)
        self._clients.append(client)
        return client


def _connected(path: str) -> socket.socket:
    sock = make_blocking(socket.socket(socket.AF_UNIX))
    sock.connect(path)
    return sock


def _request(payload: Payload) -> bytes:
    return encode(Request(payload.NAME, msgspec.Raw(msgspec.json.encode(payload))))


def _timed(once: Callable[[], int], seconds: float) -> dict[str, float]:
    """Call `once` again and again for `seconds`; returns `latencies` of the nanoseconds that it returns."""
    warm = time.monotonic() + _WARM_UP
    while time.monotonic() < warm:
        once()
    end = time.monotonic() + seconds
    samples = []
    while time.monotonic() < end:
        samples.append(once())
    return latencies(samples)


def _round_trip(sock: socket.socket, question: bytes, answer: bytes) -> int:
    """Send a question; returns the nanoseconds until the whole answer was there."""
    begun = time.perf_counter_ns()
    sock.sendall(question)
    found = receive_some(sock)
    while len(found) < len(answer):
        found += receive_some(sock)
    took = time.perf_counter_ns() - begun
    if found != answer:
        raise WrongBytesError(f"asked {question[:100]!r}, expected {answer[:100]!r}, got {found[:100]!r}")
    return took


def _come_back(sock: socket.socket, frame: bytes) -> float:
    """Wait until a frame has come back; returns when it had (`time.monotonic`)."""
    found = receive_some(sock)
    while len(found) < len(frame):
        found += receive_some(sock)
    if found != frame:
        raise WrongBytesError(f"expected {frame[:100]!r}, got {found[:100]!r}")
    return time.monotonic()


def _connection(path: str, question: bytes, answer: bytes) -> int:
    begun = time.perf_counter_ns()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(question)
        found = sock.recv(4096)
    took = time.perf_counter_ns() - begun
    if not found:
        raise StalledError("a connection was closed without an answer")
    if found != answer:
        raise WrongBytesError(f"asked {question[:100]!r}, expected {answer[:100]!r}, got {found[:100]!r}")
    return took


if __name__ == "__main__":
    serve(Clients())
