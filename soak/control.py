"""A VM's end of its control channel, on which its agent answers."""

import contextlib
import socket

from bench.streams import WrongBytesError
from bench.vms import ACK, MESSAGE
from cc_proxy.hyperstart.codes import Code

#: The daemon's own ping has no payload. Those of clients have one.
_OF_THE_DAEMON = Code.PING, b""
_ERROR = MESSAGE.pack(Code.ERROR, MESSAGE.size)
_NEXT = MESSAGE.pack(Code.NEXT, MESSAGE.size + 4) + bytes(4)


class Control:
    """The agent's end of the channel."""

    def __init__(self, sock: socket.socket, container: str) -> None:
        self._sock = sock
        self._container = container

    def carry_out(self, expected: Code, *, success: bool = True) -> None:
        """Wait for a client's command, and acknowledge or refuse it. Raises `WrongBytesError`."""
        while (found := self._read_command()) == _OF_THE_DAEMON:
            self._sock.sendall(ACK)
        self._check(found, expected)
        self._sock.sendall(_NEXT + (ACK if success else _ERROR))

    def answer_daemon(self) -> None:
        """Acknowledge the daemon's own pings, which it sends if a marker does not come back soon."""
        with contextlib.suppress(BlockingIOError):
            while self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                self._check(self._read_command(), *_OF_THE_DAEMON)
                self._sock.sendall(ACK)

    def say_nonsense(self) -> None:
        """Send what no agent sends."""
        self._sock.sendall(bytes(MESSAGE.size))

    def close(self) -> None:
        self._sock.close()

    def _check(self, found: tuple[int, bytes], code: Code, payload: bytes | None = None) -> None:
        if found[0] != code or payload not in (None, found[1]):
            raise WrongBytesError(f"{self._container}: command {found[0]}, and not {code}")

    def _read_command(self) -> tuple[int, bytes]:
        code, length = MESSAGE.unpack(self._sock.recv(MESSAGE.size, socket.MSG_WAITALL))
        size = length - MESSAGE.size
        return code, self._sock.recv(size, socket.MSG_WAITALL) if size else b""
