"""QEMU's own control channel (QMP): one JSON object per line, in both directions."""

import json
import socket
from typing import Any

_READ_SIZE = 64 * 1024


class Qmp:
    """A connection to QEMU that reads without blocking. QEMU is trusted: its lines may have any length."""

    def __init__(self, path: str) -> None:
        """Connect. Raises `OSError`."""
        self._sock = socket.socket(socket.AF_UNIX)
        self._rest = b""
        #: Whether QEMU has closed the connection.
        self.at_eof = False
        try:
            self._sock.connect(path)
        except BaseException:
            self._sock.close()
            raise

    def send(self, command: str) -> None:
        """Send a command. If QEMU has gone, only `at_eof` tells."""
        try:
            self._sock.send(json.dumps({"execute": command}).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            self.at_eof = True

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived."""
        try:
            data = self._sock.recv(_READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.at_eof = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def fileno(self) -> int:
        """Return the socket's fd, to wait on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection. QEMU then accepts another one."""
        self._sock.close()
