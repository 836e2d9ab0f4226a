"""A VM and a client of its own, in one thread, to time an echo and a command through the daemon."""

import socket
import time
from contextlib import ExitStack
from typing import Self

import msgspec

from bench.flow import make_blocking, receive_some
from bench.streams import WrongBytesError, payload_of
from bench.vms import ACK, MESSAGE, READY
from cc_proxy.api import AllocateIo, Bye, Hyper, encode_frame
from cc_proxy.api.fdpassing import read_fd
from cc_proxy.api.frames import FRAME_HEADER
from soak.sockets import PATIENCE, Connection, VmSockets

_CONTAINER = "probe"
_PAYLOAD = 64


class Probe:
    """Measures round trips, one at a time, in seconds."""

    def __init__(self, proxy: str, directory: str) -> None:
        self._stack = ExitStack()
        self._number = 0
        self._connection = Connection(proxy)
        self._stack.callback(self._connection.close)
        sockets = VmSockets(directory, _CONTAINER)
        self._stack.callback(sockets.close)
        self._connection.send(sockets.hello(_CONTAINER))
        self._control, self._io = (self._stack.enter_context(sock) for sock in sockets.accept())
        self._control.sendall(READY)
        self._connection.expect(True, "hello of the probe")
        self._connection.send(AllocateIo(1))
        answer = self._connection.expect(True, "allocateIO of the probe")
        self._seq = msgspec.json.decode(bytes(answer.data or b""))["ioBase"]
        fd = read_fd(self._connection.sock, timeout=PATIENCE)
        self._client = make_blocking(self._stack.enter_context(socket.socket(fileno=fd)))
        self._start_process()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start_process(self) -> None:
        command = Hyper("execcmd", msgspec.Raw(b'{"process":{"stdio":%d}}' % self._seq))
        self._connection.send(command)
        _, length = MESSAGE.unpack(_exactly(self._control, MESSAGE.size))
        _exactly(self._control, length - MESSAGE.size)
        self._control.sendall(ACK)
        self._connection.expect(True, "execcmd of the probe")

    def echo(self) -> float:
        """Time a frame to the VM and back. Markers are sent back when that is over."""
        self._number += 1
        frame = encode_frame(self._seq, payload_of(0, self._seq, self._number, _PAYLOAD))
        begun = time.perf_counter()
        self._client.sendall(frame)
        taken = _exactly(self._io, len(frame))
        self._io.sendall(taken)
        found = _exactly(self._client, len(frame))
        took = time.perf_counter() - begun
        if found != frame:
            raise WrongBytesError(f"the probe sent {frame!r} and got {found!r}")
        self._send_marker_back()
        return took

    def ping(self) -> float:
        """Time a command: the request, the agent's answer, and the response."""
        begun = time.perf_counter()
        self._connection.send(Hyper("ping"))
        _exactly(self._control, MESSAGE.size)
        self._control.sendall(ACK)
        self._connection.expect(True, "ping of the probe")
        return time.perf_counter() - begun

    def end(self) -> None:
        """Unregister the VM."""
        self._connection.send(Bye(_CONTAINER))
        self._connection.expect(True, "bye of the probe")

    def _send_marker_back(self) -> None:
        try:
            marker = self._io.recv(FRAME_HEADER.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._io.sendall(marker)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = receive_some(sock, size)
    while len(data) < size:
        data += receive_some(sock, size - len(data))
    return data
