"""A VM's console, line by line into the log (`-v 3`)."""

import re
import socket
from typing import Self

from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.proxy.vms.dialer import Connected

_LONGEST_LINE = 1024
#: Little at once: a console that floods must not hold up the VM's streams.
_READ_SIZE = 512
_LINE_END = re.compile(rb"[\r\n]+")


class LineSplitter:
    """Splits whatever a console writes into lines of a bounded length. No I/O."""

    def __init__(self) -> None:
        self._rest = b""

    def receive_data(self, data: bytes) -> list[str]:
        """Take bytes as they arrived and return the lines they complete; empty ones are left out."""
        *lines, rest = _LINE_END.split(self._rest + data)
        cut = len(rest) - len(rest) % _LONGEST_LINE
        self._rest = rest[cut:]
        return [
            line[start : start + _LONGEST_LINE].decode(errors="backslashreplace")
            for line in (*lines, rest[:cut])
            for start in range(0, len(line), _LONGEST_LINE)
        ]

    def finish(self) -> list[str]:
        """Return the last line, if it has no end."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="backslashreplace")] if rest else []


class Console:
    """Owner of a console's socket. Pump thread, once it is open."""

    def __init__(self, vm: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._vm = vm
        self._sock = sock
        self._lines = LineSplitter()

    @staticmethod
    def is_wanted(path: str) -> bool:
        """Whether to connect to the console at `path`: if there is one, and the log wants it."""
        return bool(path) and logger.isEnabledFor(CONSOLE)

    @classmethod
    def open(cls, vm: str, path: str, connected: Connected) -> Self | None:
        """Take over the console's socket, if it was connected; the log says if it should have been."""
        if connected.console_error:
            fields = {"vm": vm, "console": path, "error": connected.console_error}
            logger.warning("console cannot be read", extra=fields)
        return cls(vm, connected.console) if connected.console else None

    def fileno(self) -> int:
        """The socket's fd, to wait on."""
        return self._sock.fileno()

    def read(self) -> bool:
        """Log what has arrived; returns whether more may come."""
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._log(self._lines.receive_data(data) if data else self._lines.finish())
        return bool(data)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _log(self, lines: list[str]) -> None:
        for line in lines:
            logger.log(CONSOLE, "console", extra={"vm": self._vm, "line": line})
