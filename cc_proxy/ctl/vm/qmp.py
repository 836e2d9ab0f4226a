"""QEMU's own control channel (QMP): a JSON object a line, in both directions."""

import json
import socket
from typing import Any

_READ_SIZE = 64 * 1024


class Qmp:
    """A connection that reads without blocking. The peer is ours: its lines are not bounded."""

    def __init__(self, path: str) -> None:
        """Connect. Raises `OSError`."""
        self._sock = socket.socket(socket.AF_UNIX)
        self._rest = b""
        #: Whether QEMU has closed it.
        self.at_eof = False
        try:
            self._sock.connect(path)
        except BaseException:
            self._sock.close()
            raise

    def send(self, command: str) -> None:
        """Send a command. One that QEMU does not get any more is as good as one that it has got."""
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
        """The socket's fd, to wait on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; QEMU takes the next one then."""
        self._sock.close()
