"""A token bucket: how much may happen at once, and how much per second in the long run."""


class TokenBucket:
    """Holds up to `burst` tokens, and is full at first. No lock and no clock: the caller brings both.

    `now` is in seconds, of one monotonic clock. `rate` is in tokens per second; it applies to the time
    since the call before, and may be another one in each call.
    """

    __slots__ = ("_burst", "_filled_at", "_left")

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._left = burst  # below zero while tokens are owed
        self._filled_at = 0.0

    def take(self, number: float, rate: float, now: float) -> float:
        """Take `number` tokens, even if they are not there yet; return the seconds until they are."""
        self._fill(rate, now)
        self._left -= number
        return max(0.0, -self._left / rate)

    def has(self, number: float, rate: float, now: float) -> bool:
        """Return whether `number` tokens are there, and take none."""
        self._fill(rate, now)
        return self._left >= number

    def full(self, rate: float, now: float) -> bool:
        """Return whether the bucket is full: then a new one would do as well."""
        return self.has(self._burst, rate, now)

    def _fill(self, rate: float, now: float) -> None:
        # A thread may have looked at the clock before another one that was here first.
        elapsed = max(0.0, now - self._filled_at)
        self._left = min(self._burst, self._left + elapsed * rate)
        self._filled_at += elapsed
