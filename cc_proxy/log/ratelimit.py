"""How often an event may be logged: a client that repeats what makes one cannot fill the log."""

import logging
import threading
import time
from collections import Counter, defaultdict

from cc_proxy.tokens import TokenBucket

#: Events of one kind that are all logged, and how many more in each second from then on.
BURST = 100
PER_SECOND = 2.0


class RateLimit(logging.Filter):
    """Lets events of each kind, which is a level and a text, through at a bounded rate. Any thread.

    Below info there is no bound: each line there is one that an operator, looking for a fault, has asked for.
    Texts are constants, so there are few kinds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._buckets: defaultdict[tuple[int, str], TokenBucket] = defaultdict(lambda: TokenBucket(BURST))
        self._suppressed: Counter[tuple[int, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether an event is to be logged."""
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
        """Return how many events of each kind were held back since this was called last."""
        with self._lock:
            suppressed, self._suppressed = self._suppressed, Counter()
        return suppressed
