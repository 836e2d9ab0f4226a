"""Unexpected errors: each is logged once, with its traceback, and counted."""

import logging
import threading
from collections import Counter

_logger = logging.getLogger("cc_proxy")
_lock = threading.Lock()  # guards _counts; nothing else is locked while it is held
_counts: Counter[str] = Counter()


def note(event: str, **fields: object) -> None:
    """Log the exception that is being handled, and count it under `event`, a constant. Any thread.

    Never raises: threads that must go on call this, and there may be no memory for a log line.
    """
    try:
        count(event)
        _logger.exception(event, extra=fields)  # noqa: LOG004 - the handler is the caller's
    except Exception:  # noqa: S110 - there is nothing left to do
        pass


def count(event: str) -> None:
    """Count an error without logging it. Any thread."""
    with _lock:
        _counts[event] += 1


def restore(counts: dict[str, int]) -> None:
    """Go on with the counts of the previous process. Any thread."""
    with _lock:
        _counts.update(counts)


def counts() -> dict[str, int]:
    """Return how many errors there were since the process began, by event. Any thread."""
    with _lock:
        return dict(_counts)
