"""The log's levels and its one logger: everything that code needs to log. Writing is elsewhere."""

import logging
from typing import Any, Literal

LogLevel = Literal["error", "warning", "info", "debug", "io", "console"]
LogFormat = Literal["auto", "json", "text"]

#: Frames on the I/O channel, shortened (`-v 2`).
IO = 8
#: A VM's console (`-v 3`).
CONSOLE = 6

LEVELS: dict[LogLevel, int] = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "io": IO,
    "console": CONSOLE,
}

#: The levels of `-v`. The environment may give these numbers too.
VERBOSE: dict[int, LogLevel] = {0: "info", 1: "debug", 2: "io", 3: "console"}

#: The attributes that every LogRecord has; all others are fields.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

logger = logging.getLogger("cc_proxy")


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of an event, which were given as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def current_level() -> LogLevel:
    """Return the lowest level that is logged. Any thread."""
    least = logger.getEffectiveLevel()
    return min(LEVELS, key=lambda level: (LEVELS[level] < least, LEVELS[level]))


def set_level(level: LogLevel) -> None:
    """Log events of `level` and above. Any thread."""
    logger.setLevel(LEVELS[level])


def priority_of(level: int) -> int:
    """Return the syslog priority of a logging level."""
    return next(priority for least, priority in _PRIORITIES if level >= least)
