"""A VM whose agent says READY to whoever connects, and acknowledges every command at once."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
from contextlib import ExitStack, suppress
from typing import Self

from cc_proxy.hyperstart.codes import Code

_HEADER = struct.Struct(">II")
_READY = _HEADER.pack(Code.READY, _HEADER.size)
_ACK = _HEADER.pack(Code.ACK, _HEADER.size)


class AcknowledgingVm:
    """Its sockets are in `directory`; a thread serves them from enter to exit."""

    def __init__(self, directory: str) -> None:
        self.control_path = f"{directory}/ctl"
        self.io_path = f"{directory}/io"
        self._stack = ExitStack()
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self._buffers: dict[socket.socket, bytearray] = {}
        self._thread = threading.Thread(target=self._serve, name="agent")

    def __enter__(self) -> Self:
        self._listeners = [self._listen(path) for path in (self.control_path, self.io_path)]
        self._ended, self._end = (self._stack.enter_context(end) for end in socket.socketpair())
        self._selector.register(self._ended, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.shutdown(socket.SHUT_WR)
        self._thread.join()
        for sock in self._buffers:
            sock.close()
        self._stack.close()
        for path in (self.control_path, self.io_path):
            os.unlink(path)

    def _listen(self, path: str) -> socket.socket:
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(64)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._ended:
                    return
                if sock in self._listeners:
                    self._accept(sock)
                else:
                    self._read(sock)

    def _accept(self, listener: socket.socket) -> None:
        sock = listener.accept()[0]
        self._buffers[sock] = bytearray()
        self._selector.register(sock, selectors.EVENT_READ)
        if listener is self._listeners[0]:
            _say(sock, _READY)

    def _read(self, sock: socket.socket) -> None:
        buffer = self._buffers[sock]
        try:
            data = sock.recv(65_536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(sock)
            del self._buffers[sock]
            sock.close()
        elif sock.getsockname() == self.control_path:
            buffer += data
            self._acknowledge(sock, buffer)

    def _acknowledge(self, sock: socket.socket, buffer: bytearray) -> None:
        while len(buffer) >= _HEADER.size:
            _, length = _HEADER.unpack_from(buffer)
            if len(buffer) < length:
                return
            del buffer[:length]
            _say(sock, _ACK)


def _say(sock: socket.socket, message: bytes) -> None:
    with suppress(OSError):  # whoever it was has gone
        sock.sendall(message)
