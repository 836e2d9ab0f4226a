"""A VM's console: what it says while the VM boots, and line by line into the log (`-v 3`)."""

import contextlib
import re
import socket
from typing import Self

from cc_proxy.linux.fds import unread
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.log.printable import printable
from cc_proxy.proxy.vms.dialer import Connected

_LONGEST_LINE = 1024
#: Little at once: a console that floods must not hold up the VM's streams.
_READ_SIZE = 512
#: Characters of its last lines that are remembered: an error with them fits into a response.
_MOST_REMEMBERED = 500
_BETWEEN = " | "
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
    """Owner of a console's socket. The thread that waits for the VM to boot, then the pump's."""

    def __init__(self, vm: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._vm = vm
        self._sock = sock
        self._lines = LineSplitter()
        self._last = ""

    @staticmethod
    def is_logged() -> bool:
        """Whether the log wants what consoles say. If not, they are read only while VMs boot."""
        return logger.isEnabledFor(CONSOLE)

    @classmethod
    def open(cls, vm: str, path: str, connected: Connected) -> Self | None:
        """Take over the console's socket, if it was connected; the log says if it could not be."""
        if connected.console_error:
            fields = {"vm": vm, "console": path, "error": connected.console_error}
            logger.warning("console cannot be read", extra=fields)
        return cls(vm, connected.console) if connected.console else None

    def fileno(self) -> int:
        """The socket's fd, to wait on."""
        return self._sock.fileno()

    def read(self) -> bool:
        """Take some of what has arrived, without waiting; returns whether more may come."""
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._take(self._lines.receive_data(data) if data else self._lines.finish())
        return bool(data)

    def last_lines(self) -> str:
        """Return, printable and as one line, what the console has said last. It is not to be read after
        that.
        """
        with contextlib.suppress(OSError):
            for _ in range(0, unread(self._sock), _READ_SIZE):
                self.read()
        self._take(self._lines.finish())
        return self._last

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _take(self, lines: list[str]) -> None:
        for line in lines:
            logger.log(CONSOLE, "console", extra={"vm": self._vm, "line": line})
        last = _BETWEEN.join(filter(None, (self._last, *map(printable, lines))))
        if len(last) > _MOST_REMEMBERED:  # whole lines, but for one that is longer
            cut = last[-_MOST_REMEMBERED:]
            last = cut.partition(_BETWEEN)[2] or cut
        self._last = last
