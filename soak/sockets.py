"""The sockets of a VM and of its clients. They wait for what must happen, but not for ever."""

import contextlib
import os
import socket

import msgspec

from bench.flow import make_blocking
from bench.streams import WrongBytesError
from bench.vms import listen
from cc_proxy.api import Hello, Payload, Request, Response
from cc_proxy.api.transport import connect, read_message, write_message

#: Seconds to wait for anything that must happen.
PATIENCE = 30.0


class Connection:
    """A client's connection that sends requests and receives responses separately, to pipeline them."""

    def __init__(self, proxy: str) -> None:
        self.sock = connect(proxy, timeout=PATIENCE)

    def send(self, *payloads: Payload) -> None:
        for payload in payloads:
            data = msgspec.Raw(msgspec.json.encode(payload))
            write_message(self.sock, Request(payload.NAME, data), timeout=PATIENCE)

    def receive(self) -> Response:
        response = read_message(self.sock, Response, timeout=PATIENCE)
        if response is None:
            raise WrongBytesError("a connection was closed in place of a response")
        return response

    def expect(self, success: bool, what: str) -> Response:
        response = self.receive()
        if response.success is not success:
            raise WrongBytesError(f"{what}: {response.error or 'succeeded'}")
        return response

    def expect_hang_up(self) -> None:
        self.sock.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionResetError):
            if self.sock.recv(1):
                raise WrongBytesError("nonsense was answered")

    def close(self) -> None:
        self.sock.close()


class VmSockets:
    """The listening sockets of a VM's two channels."""

    def __init__(self, directory: str, name: str) -> None:
        self.paths = [f"{directory}/{name}.{channel}" for channel in ("ctl", "io")]
        self._listeners = [listen(path) for path in self.paths]

    def hello(self, container: str) -> Hello:
        return Hello(container, *self.paths)

    def accept(self) -> list[socket.socket]:
        return [make_blocking(listener.accept()[0]) for listener in self._listeners]

    def close(self) -> None:
        for path, listener in zip(self.paths, self._listeners, strict=True):
            listener.close()
            os.unlink(path)
