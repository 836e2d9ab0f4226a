"""Events for the journal with fields of its own, if python3-systemd is there.

`journalctl CC_VM=…` finds them then. MESSAGE is still the JSON line, for whoever reads with `-o cat`.
"""

import json
import logging
from typing import Any

try:
    from systemd import journal
except ImportError:
    journal = None

#: What the journal calls this program.
IDENTIFIER = "cc-proxy"
#: Longest field, in bytes: journalctl shows longer ones only when asked to (`-a`).
_LONGEST_FIELD = 4_000


def is_native_possible() -> bool:
    """Whether python3-systemd is there."""
    return journal is not None


def send(line: str, priority: int, record: logging.LogRecord, fields: dict[str, Any]) -> None:
    """Send an event. Waits while the journal is busy. Raises `OSError` if it takes none."""
    native = {f"CC_{name.upper()}": _encode(value) for name, value in fields.items() if value is not None}
    journal.send(
        line,
        PRIORITY=str(priority),
        SYSLOG_IDENTIFIER=IDENTIFIER,
        CODE_FILE=record.pathname,
        CODE_LINE=record.lineno,
        CODE_FUNC=record.funcName or "",
        **native,
    )


def _encode(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode(errors="backslashreplace")[:_LONGEST_FIELD]
