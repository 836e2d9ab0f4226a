"""A port as the hypervisor offers it to hosts: an AF_UNIX socket that serves one of them at a time."""

import socket
from collections.abc import Sequence

from cc_proxy.agent.loop import READ, Loop, Turn
from cc_proxy.agent.ports import Port
from cc_proxy.agent.socketfile import SocketFile
from cc_proxy.linux.fds import Piece, close_stream, send_pieces

#: Seconds until the next try to accept a connection for which the process had no fd left.
_ACCEPT_AGAIN = 0.1


class SocketPort(Port):
    """Listens at `path`. A host that connects while another is served waits, and gets no answer.

    Raises `CannotListen` if the socket cannot be had.
    """

    def __init__(self, loop: Loop, path: str, turn: Turn) -> None:
        super().__init__(loop, turn)
        self._file = SocketFile(path)
        self._peer: socket.socket | None = None

    def close(self) -> None:
        """Hang up, and remove the socket. May be called more than once."""
        self._loop.forget(self._file.sock.fileno())
        if self._host is not None:
            self._loop.forget(self._host)
            self._host = None
        self._hang_up()
        self._file.close()

    def _await_host(self) -> None:
        self._loop.watch(self._file.sock.fileno(), READ, self._accept, self._turn)

    def _accept(self, _events: int) -> None:
        self._loop.forget(self._file.sock.fileno())
        try:
            self._peer, _ = self._file.sock.accept()
        except OSError:
            self._loop.call_later(_ACCEPT_AGAIN, self._await_host)
            return
        self._peer.setblocking(False)
        self._take_host(self._peer.fileno())

    def _read(self, _host: int, size: int) -> bytes:
        assert self._peer is not None
        return self._peer.recv(size)

    def _write(self, _host: int, pieces: Sequence[Piece]) -> Sequence[Piece]:
        assert self._peer is not None
        return send_pieces(self._peer, pieces)

    def _hang_up(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            close_stream(peer)
