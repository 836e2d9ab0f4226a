"""The log's levels and its one logger: what everything that logs needs, and nothing that writes."""

import logging
from typing import Any, Literal

LogLevel = Literal["error", "warning", "info", "debug", "io", "console"]
LogFormat = Literal["auto", "json", "text"]

#: What passes the I/O channel, shortened (`-v 2`).
IO = 8
#: What the VM writes to its console (`-v 3`).
CONSOLE = 6

LEVELS: dict[LogLevel, int] = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "io": IO,
    "console": CONSOLE,
}

#: The levels of `-v`, which the environment may give by number too.
VERBOSE: dict[int, LogLevel] = {0: "info", 1: "debug", 2: "io", 3: "console"}

#: What a LogRecord has of its own: everything else in one is a field.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

logger = logging.getLogger("cc_proxy")


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of an event: what was given as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def current_level() -> LogLevel:
    """Return the least level that is logged."""
    least = logger.getEffectiveLevel()
    return min(LEVELS, key=lambda level: (LEVELS[level] < least, LEVELS[level]))


def set_level(level: LogLevel) -> None:
    """Log what is at `level` or above. Any thread may call."""
    logger.setLevel(LEVELS[level])


def priority_of(level: int) -> int:
    """Return the syslog priority of a logging level."""
    return next(priority for least, priority in _PRIORITIES if level >= least)
