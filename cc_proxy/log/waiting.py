"""The queue of events, bounded in bytes, from the threads that log to the thread that writes."""

import json
import logging
import logging.handlers
import queue
import sys
from typing import cast

from cc_proxy.log.levels import fields_of

#: Bytes that may wait to be written. Events beyond that are dropped and counted.
_MOST_WAITING = 4 * 1024 * 1024
#: Roughly how many bytes an event takes besides its text.
_EVENT_SIZE = 1_024
#: Longest text in an event, and longest traceback, list or table, in characters. The journal splits lines
#: over 48 KiB.
_LONGEST_TEXT = 1_000
_LONGEST_TRACE = 8_000
#: Seconds that writing the last lines may take.
_LAST_LINES = 1.0


class EventQueue(queue.Queue[tuple[int, logging.LogRecord | None]]):
    """Events with their sizes. The queue's own size and limit are in bytes, too."""

    def __init__(self) -> None:
        super().__init__(_MOST_WAITING)
        self._size = 0

    def _qsize(self) -> int:
        return self._size

    def _put(self, item: tuple[int, logging.LogRecord | None]) -> None:
        super()._put(item)
        self._size += item[0]

    def _get(self) -> tuple[int, logging.LogRecord | None]:
        item: tuple[int, logging.LogRecord | None] = super()._get()
        self._size -= item[0]
        return item


class QueueWriter(logging.handlers.QueueHandler):
    """Puts events, shortened, into the queue. When the queue is full, counts them instead."""

    def __init__(self, waiting: EventQueue) -> None:
        super().__init__(waiting)
        self._dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue an event. The handler's lock is held."""
        try:
            size = _shorten(record)
            if self._dropped:
                record.dropped_before = self._dropped
            self.queue.put_nowait((size, record))
            self._dropped = 0
        except queue.Full:
            self._dropped += 1


class QueueReader(logging.handlers.QueueListener):
    """Passes events from the queue to the handler that writes them, in a thread of its own."""

    def __init__(self, waiting: EventQueue, handler: logging.Handler) -> None:
        super().__init__(waiting, handler)
        self._waiting = waiting

    def start(self) -> None:
        super().start()
        assert self._thread
        self._thread.name = "log"

    def dequeue(self, block: bool) -> logging.LogRecord:
        record = self._waiting.get(block)[1]
        return cast(logging.LogRecord, record)  # None ends the listener

    def enqueue_sentinel(self) -> None:
        self._waiting.put_nowait((1, None))

    def finish(self) -> bool:
        """End the thread once it has written all events. False if it has not ended within two seconds."""
        thread = self._thread
        try:
            self._waiting.put((1, None), timeout=_LAST_LINES)
        except queue.Full:
            return False
        if thread:
            thread.join(_LAST_LINES)
        return not (thread and thread.is_alive())


def _shorten(record: logging.LogRecord) -> int:
    """Cut an event's long fields, which a client may have chosen; returns roughly how many bytes it takes."""
    size = _EVENT_SIZE
    for name, value in fields_of(record).items():
        size += _shorten_field(record, name, value)
    if record.exc_info:
        # Formatted now, because a traceback keeps all local variables of its functions alive.
        trace = logging.Formatter().formatException(record.exc_info)
        record.exc_info, record.exc_text = None, trace[-_LONGEST_TRACE:]
        size += sys.getsizeof(record.exc_text)
    return size


def _shorten_field(record: logging.LogRecord, name: str, value: object) -> int:
    if isinstance(value, int | float | None):
        return 0
    text = value if isinstance(value, str) else _spelled(value)
    longest = _LONGEST_TEXT if isinstance(value, str) and name != "stack" else _LONGEST_TRACE
    if len(text) > longest:
        text = text[:longest] + "…"
        setattr(record, name, text)
    return sys.getsizeof(text)


def _spelled(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    except Exception:  # the thread that writes it will report that
        return ""
