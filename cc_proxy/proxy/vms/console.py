"""Reading a VM's console: its last lines while the VM boots, and all lines for the log (`-v 3`)."""

import contextlib
import re
import socket
from typing import Self

from cc_proxy.continuity.state.vms import ConsoleState
from cc_proxy.linux.fds import Fd, close_stream, unread
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.log.printable import printable
from cc_proxy.proxy.vms.dialer import Connected

#: The most bytes of a line in the log, and of one read: so few that a flood on the console does not hold up
#: the VM's streams.
_LONGEST_LINE = 1024
#: The most characters of the last lines. An error that ends with them fits into a response.
_MOST_REMEMBERED = 500
_BETWEEN = " | "
_LINE_END = re.compile(rb"[\r\n]+")


class LineSplitter:
    """Splits a console's output into lines, and long ones into pieces. No I/O."""

    def __init__(self, rest: bytes = b"") -> None:
        """`rest` is a line that has begun."""
        self._rest = rest

    @property
    def rest(self) -> bytes:
        """The last line, if it has no end yet."""
        return self._rest

    def receive_data(self, data: bytes) -> list[str]:
        """Take some output; returns the lines that it completes, without empty ones."""
        *lines, rest = _LINE_END.split(self._rest + data)
        cut = len(rest) - len(rest) % _LONGEST_LINE
        self._rest = rest[cut:]
        return [
            line[start : start + _LONGEST_LINE].decode(errors="backslashreplace")
            for line in (*lines, rest[:cut])
            for start in range(0, len(line), _LONGEST_LINE)
        ]

    def finish(self) -> list[str]:
        """Return the last line, if it was not completed."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="backslashreplace")] if rest else []


class Console:
    """Owns a console's socket. The thread that waits for READY uses it, and then the pump's."""

    def __init__(self, vm: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._vm = vm
        self._sock = sock
        self._lines = LineSplitter()
        self._last = ""

    @staticmethod
    def is_logged() -> bool:
        """Whether the log takes consoles' lines. If not, consoles are read only while VMs boot."""
        return logger.isEnabledFor(CONSOLE)

    @classmethod
    def open(cls, vm: str, path: str, connected: Connected) -> Self | None:
        """Take over the console's socket if it is connected; log why if connecting failed."""
        if connected.console_error:
            fields = {"vm": vm, "console": path, "error": connected.console_error}
            logger.warning("console cannot be read", extra=fields)
        return cls(vm, connected.console) if connected.console else None

    @classmethod
    def from_state(cls, vm: str, state: ConsoleState) -> Self:
        """Return a console that goes on where another one stood."""
        console = cls(vm, socket.socket(fileno=state.fd.number))
        console._lines, console._last = LineSplitter(state.line), state.last
        return console

    def hand_over(self) -> ConsoleState | None:
        """Give up the socket as a value, for `from_state`; None if it is closed."""
        if self._sock.fileno() < 0:
            return None
        return ConsoleState(Fd(self._sock.detach()), self._lines.rest, self._last)

    def fileno(self) -> int:
        """The socket's fd."""
        return self._sock.fileno()

    def read(self) -> bool:
        """Read once, without waiting; returns False at the end of file."""
        try:
            data = self._sock.recv(_LONGEST_LINE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._take(self._lines.receive_data(data) if data else self._lines.finish())
        return bool(data)

    def last_lines(self) -> str:
        """Return the last lines as one printable line. Call `read` no more after that."""
        with contextlib.suppress(OSError):
            for _ in range(0, unread(self._sock), _LONGEST_LINE):
                self.read()
        self._take(self._lines.finish())
        return self._last

    def close(self) -> None:
        """Close the socket."""
        close_stream(self._sock)

    def _take(self, lines: list[str]) -> None:
        for line in lines:
            logger.log(CONSOLE, "console", extra={"vm": self._vm, "line": line})
        last = _BETWEEN.join(filter(None, (self._last, *map(printable, lines))))
        if len(last) > _MOST_REMEMBERED:  # keep whole lines, or the end of one that is longer
            cut = last[-_MOST_REMEMBERED:]
            last = cut.partition(_BETWEEN)[2] or cut
        self._last = last
