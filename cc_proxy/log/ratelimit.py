"""Limits how often an event is logged, so that no client can fill the log by repeating something."""

import logging
import threading
import time
from collections import Counter, defaultdict

from cc_proxy.tokens import TokenBucket

#: How many events of one kind are logged at once, and how many per second after that.
BURST = 100
PER_SECOND = 2.0


class RateLimit(logging.Filter):
    """Lets through events of each kind at a limited rate. A kind is a level and a text. Any thread.

    Levels below info have no limit: an operator who looks for a fault has asked for each of those lines.
    Texts are constants, so there are few kinds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._buckets: defaultdict[tuple[int, str], TokenBucket] = defaultdict(lambda: TokenBucket(BURST))
        self._suppressed: Counter[tuple[int, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Count an event; returns whether it is to be logged."""
        if record.levelno < logging.INFO:
            return True
        kind, now = (record.levelno, str(record.msg)), time.monotonic()
        with self._lock:
            bucket = self._buckets[kind]
            passes = bucket.has(1, PER_SECOND, now)
            if passes:
                bucket.take(1, PER_SECOND, now)
            else:
                self._suppressed[kind] += 1
        return passes

    def take_suppressed(self) -> dict[tuple[int, str], int]:
        """Return how many events of each kind were held back since the last call."""
        with self._lock:
            suppressed, self._suppressed = self._suppressed, Counter()
        return suppressed
