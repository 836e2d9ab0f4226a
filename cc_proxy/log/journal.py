"""Sends events to the journal with native fields, so that `journalctl CC_VM=…` finds them.

MESSAGE is still the JSON line, for `journalctl -o cat`. This module speaks the journal's native protocol, one
datagram for each event. python3-systemd speaks it too, but holds the GIL, and so stops every thread, while it
waits for a busy journal.
"""

import json
import logging
import os
import socket
import struct
from typing import Any

from cc_proxy.log.printable import printable

#: The journal's name for this program.
IDENTIFIER = "cc-proxy"
SOCKET = "/run/systemd/journal/socket"
#: Longest field, in bytes. journalctl shows longer ones only with `-a`.
_LONGEST_FIELD = 4_000


def is_there() -> bool:
    """Whether there is a journal that takes native fields."""
    return os.path.exists(SOCKET)


class Journal:
    """A connection to the journal. One thread."""

    def __init__(self) -> None:
        # Kept open, so that there is one even when there are no fds left.
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send(self, line: str, priority: int, record: logging.LogRecord, fields: dict[str, Any]) -> None:
        """Send an event. Waits while the journal is busy. Raises `OSError` if it cannot be sent."""
        own = {
            "PRIORITY": priority,
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
        }
        own |= {f"CC_{name.upper()}": value for name, value in fields.items()}
        event = [_field("MESSAGE", line.encode())]
        event += [_field(name, _encode(value)) for name, value in own.items() if value is not None]
        self._sock.sendto(b"".join(event), SOCKET)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def _field(name: str, value: bytes) -> bytes:
    """Return a field in the form that allows any value."""
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(value)), value)


def _encode(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return printable(text).encode()[:_LONGEST_FIELD]
