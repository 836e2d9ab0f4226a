"""Logging: what happened as a short text, and everything about it as fields of their own.

Code logs with the standard library: `logger.info("VM registered", extra={"vm": …})`. A line is a JSON object;
where stderr is the journal a `<N>` in front of it gives the priority, or it goes there with native fields
(cc_proxy/log/journal.py); on a terminal it is plain text.
Lines are written by a thread of their own: whoever logs never waits for whoever reads the log.
"""

import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO, cast

from cc_proxy.log import faults, journal
from cc_proxy.log.levels import (
    CONSOLE,
    IO,
    LogFormat,
    LogLevel,
    fields_of,
    logger,
    priority_of,
    set_level,
)
from cc_proxy.log.printable import printable_json, printable_lines
from cc_proxy.log.ratelimit import RateLimit
from cc_proxy.log.waiting import Listener, Waiting, Writer

try:
    from pythonjsonlogger.json import JsonFormatter
except ImportError:  # where it was until 3.1, which is what Debian 12 has
    from pythonjsonlogger.jsonlogger import JsonFormatter  # type: ignore[attr-defined,no-redef,unused-ignore]

#: Seconds between two reports of what was suppressed.
_REPORT_INTERVAL = 30.0


class _Json(JsonFormatter):
    """A JSON object a line; with `priority`, syslog's number of it in front."""

    def __init__(self, *, timestamp: bool, priority: bool = False) -> None:
        super().__init__(
            "%(levelname)s %(message)s", rename_fields={"levelname": "level"}, timestamp=timestamp
        )
        self._priority = priority

    def format(self, record: logging.LogRecord) -> str:
        line = printable_json(str(super().format(record)))  # json leaves nothing but DEL to spell out
        return f"<{priority_of(record.levelno)}>{line}" if self._priority else line


class _Text(logging.Formatter):
    """A line for people: time, level, what happened, and its fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%H:%M:%S")
        parts = [f"{time}.{record.msecs:03.0f} {record.levelname:<7} {record.getMessage()}"]
        # JSON, so that nothing a client sent can break the line or speak to the terminal.
        fields = fields_of(record)
        stack = fields.pop("stack", None)
        parts += [f"{name}={json.dumps(value, default=str)}" for name, value in fields.items()]
        line = printable_json(" ".join(parts))
        if stack:  # one line of it all would be read by nobody
            line += "\n" + printable_lines(str(stack).rstrip("\n"))
        if record.exc_text:
            line += "\n" + printable_lines(record.exc_text)
        return line


class _Sink(logging.Handler):
    """A handler that says with the next record how many before it could not be written. Its own thread."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.lost:
            record.lost_before = self.lost
        failed, self.lost = self.lost + 1, 0
        try:
            self._write(record)
        except OSError:  # a log that cannot be written must not stop anything
            self.lost = failed
        except Exception:
            self.lost = failed
            self._say_why(record)

    def _say_why(self, record: logging.LogRecord) -> None:
        """Write what nobody expected of this record, if at least that can be written."""
        event = "log line failed"
        faults.count(event)
        with contextlib.suppress(Exception):
            trace = logging.Formatter().formatException(sys.exc_info())
            why = {"msg": event, "event": str(record.msg), "exc_text": trace}
            self._write(logging.makeLogRecord(why | {"levelno": logging.ERROR, "levelname": "ERROR"}))

    def _write(self, record: logging.LogRecord) -> None:
        raise NotImplementedError


class _Stream(_Sink):
    """Writes lines."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__(formatter)
        self._output = _output_of(stream)
        self._torn = False  # whether only part of a line was written

    def _write(self, record: logging.LogRecord) -> None:
        # What comes after the half of a line is not to be lost with it.
        line = ("\n" * self._torn + self.format(record) + "\n").encode()
        left = memoryview(line)
        try:
            while left:
                left = left[self._output(left) :]
        finally:
            if len(left) < len(line):
                self._torn = bool(left)


class _Journal(_Sink):
    """Sends events to the journal, with native fields."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(formatter)
        self._journal = journal.Journal()

    def _write(self, record: logging.LogRecord) -> None:
        self._journal.send(self.format(record), priority_of(record.levelno), record, fields_of(record))

    def close(self) -> None:
        self._journal.close()
        super().close()


class Logging:
    """The process's log, from `start` to `stop`."""

    def __init__(self, level: LogLevel, form: LogFormat, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr or cast(TextIO, _Nowhere())
        for name, number in (("IO", IO), ("CONSOLE", CONSOLE)):
            logging.addLevelName(number, name)
        waiting = Waiting()
        self._front = Writer(waiting)
        self._rate = RateLimit()
        self._front.addFilter(self._rate)
        self._sink = _sink(form, stream)
        self._listener = Listener(waiting, self._sink)
        self._level = level
        self._reported_at = time.monotonic()

    def start(self) -> None:
        """Begin to log. A log that cannot be written must not stop anything: such errors are ignored."""
        logging.raiseExceptions = False
        logger.propagate = False
        logger.addHandler(self._front)
        set_level(self._level)
        self._listener.start()

    def set_level(self, level: LogLevel) -> None:
        """Log what is at `level` or above. Any thread may call."""
        set_level(level)

    def report_suppressed(self) -> None:
        """Log what was suppressed, if it is time to; to be called now and then, by one thread."""
        if time.monotonic() - self._reported_at >= _REPORT_INTERVAL:
            self._report()

    def stop(self) -> bool:
        """Write what waits, and log no more.

        Returns False if nobody takes it: then there may be a thread that waits to write it.
        """
        self._report()
        logger.removeHandler(self._front)
        if not self._listener.finish():
            return False
        self._sink.close()
        return not self._sink.lost

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        for (level, event), count in self._rate.take_suppressed().items():
            logger.log(level, "log lines suppressed", extra={"event": event, "count": count})


class _Nowhere(io.TextIOBase):
    """Where lines go if stderr is closed."""

    def write(self, text: str) -> int:
        return len(text)


def _output_of(stream: TextIO) -> Callable[[memoryview], int]:
    """Return what writes bytes there, some of them at least, and says how many.

    Past the stream's own buffer: that keeps what could not be written, and does not say how much was.
    """
    try:
        return partial(os.write, stream.fileno())
    except (OSError, ValueError):  # there is no file behind it
        return partial(_write_text, stream)


def _write_text(stream: TextIO, data: memoryview) -> int:
    stream.write(str(data, "utf-8"))
    stream.flush()
    return len(data)


def stderr_is_journal(stream: TextIO) -> bool:
    """Whether `stream` is the one that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _sink(form: LogFormat, stream: TextIO) -> _Sink:
    if form == "text" or (form == "auto" and stream.isatty()):
        return _Stream(stream, _Text())
    if not stderr_is_journal(stream):
        return _Stream(stream, _Json(timestamp=True))
    if journal.is_there():
        return _Journal(_Json(timestamp=False))
    return _Stream(stream, _Json(timestamp=False, priority=True))
