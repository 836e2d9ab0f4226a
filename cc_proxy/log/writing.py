"""Writing the log. An event is a short constant text, and everything about it is in fields.

Code logs with the standard library: `logger.info("VM registered", extra={"vm": …})`. A line is a JSON object,
or plain text on a terminal. If stderr is the journal, events go there with native fields
(cc_proxy/log/journal.py); if that is not possible, a `<N>` before the line gives the priority. A separate
thread writes the lines, so no other thread waits for the log's reader.
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
from cc_proxy.log.waiting import EventQueue, QueueReader, QueueWriter

try:
    from pythonjsonlogger.json import JsonFormatter
except ImportError:  # its place before 3.1; Debian 12 has an older one
    from pythonjsonlogger.jsonlogger import JsonFormatter  # type: ignore[attr-defined,no-redef,unused-ignore]

#: Seconds between two reports of suppressed events.
_REPORT_INTERVAL = 30.0


class JsonLines(JsonFormatter):
    """Formats a line as a JSON object; with `priority`, puts the syslog priority before it."""

    def __init__(self, *, timestamp: bool, priority: bool = False) -> None:
        super().__init__(
            "%(levelname)s %(message)s", rename_fields={"levelname": "level"}, timestamp=timestamp
        )
        self._priority = priority

    def format(self, record: logging.LogRecord) -> str:
        line = printable_json(str(super().format(record)))  # json escapes everything except DEL
        return f"<{priority_of(record.levelno)}>{line}" if self._priority else line


class TextLines(logging.Formatter):
    """Formats a line for people: time, level, text, and the fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%H:%M:%S")
        parts = [f"{time}.{record.msecs:03.0f} {record.levelname:<7} {record.getMessage()}"]
        # As JSON, so that nothing a client sent can break the line or control the terminal.
        fields = fields_of(record)
        stack = fields.pop("stack", None)
        parts += [f"{name}={json.dumps(value, default=str)}" for name, value in fields.items()]
        line = printable_json(" ".join(parts))
        if stack:  # unreadable on one line
            line += "\n" + printable_lines(str(stack).rstrip("\n"))
        if record.exc_text:
            line += "\n" + printable_lines(record.exc_text)
        return line


class _Sink(logging.Handler):
    """A handler that adds to each record how many before it could not be written. For the log's thread."""

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
        except OSError:  # a log that cannot be written must stop nothing
            self.lost = failed
        except Exception:
            self.lost = failed
            self._say_why(record)

    def _say_why(self, record: logging.LogRecord) -> None:
        """Write why this record could not be formatted, if that can be written."""
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
        self._torn = False  # whether only part of the last line was written

    def _write(self, record: logging.LogRecord) -> None:
        # A new line first, so that a half-written line does not spoil this one.
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
        waiting = EventQueue()
        self._front = QueueWriter(waiting)
        self._rate = RateLimit()
        self._front.addFilter(self._rate)
        self._sink = _sink(form, stream)
        self._listener = QueueReader(waiting, self._sink)
        self._level = level
        self._reported_at = time.monotonic()

    def start(self) -> None:
        """Start logging. Errors of writing the log are ignored: they must stop nothing."""
        logging.raiseExceptions = False
        logger.propagate = False
        logger.addHandler(self._front)
        set_level(self._level)
        self._listener.start()

    def set_level(self, level: LogLevel) -> None:
        """Log events of `level` and above. Any thread."""
        set_level(level)

    def report_suppressed(self) -> None:
        """Log what was suppressed, if it is time for that. Call it now and then, in one thread."""
        if time.monotonic() - self._reported_at >= _REPORT_INTERVAL:
            self._report()

    def stop(self) -> bool:
        """Write what waits, and stop logging.

        Returns False if it could not be written; then a thread may still be waiting to write it.
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
    """Takes the lines if stderr is closed."""

    def write(self, text: str) -> int:
        return len(text)


def _output_of(stream: TextIO) -> Callable[[memoryview], int]:
    """Return a function that writes some bytes to the stream, and returns how many.

    It bypasses the stream's own buffer, which keeps what it cannot write, and does not say how much it wrote.
    """
    try:
        return partial(os.write, stream.fileno())
    except (OSError, ValueError):  # the stream has no fd
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
        return _Stream(stream, TextLines())
    if not stderr_is_journal(stream):
        return _Stream(stream, JsonLines(timestamp=True))
    if journal.is_there():
        return _Journal(JsonLines(timestamp=False))
    return _Stream(stream, JsonLines(timestamp=False, priority=True))
