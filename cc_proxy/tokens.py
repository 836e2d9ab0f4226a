"""A token bucket: bounds how much may happen at once, and how much per second in the long run."""


class TokenBucket:
    """Holds up to `burst` tokens, and is full at first. It has no lock and no clock: the caller brings both.

    `now` is in seconds, by one monotonic clock. `rate` is in tokens per second. It applies to the time since
    the previous call, and may differ from call to call.
    """

    __slots__ = ("_burst", "_filled_at", "_left")

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._left = burst  # below zero while tokens are owed
        self._filled_at = 0.0

    def take(self, number: float, rate: float, now: float) -> float:
        """Take `number` tokens, even if they are not there yet; returns the seconds until they are."""
        self._fill(rate, now)
        self._left -= number
        return max(0.0, -self._left / rate)

    def has(self, number: float, rate: float, now: float) -> bool:
        """Whether `number` tokens are there. Takes none."""
        self._fill(rate, now)
        return self._left >= number

    def left(self, rate: float, now: float) -> float:
        """Return how many tokens there are; negative if some are owed."""
        self._fill(rate, now)
        return self._left

    def restore(self, left: float, now: float) -> None:
        """Go on with `left` tokens, as of `now`."""
        self._left, self._filled_at = min(self._burst, left), now

    def full(self, rate: float, now: float) -> bool:
        """Whether the bucket is full, and so no different from a new one."""
        return self.has(self._burst, rate, now)

    def _fill(self, rate: float, now: float) -> None:
        # `now` can be earlier than in the previous call: threads read the clock before they take the lock.
        elapsed = max(0.0, now - self._filled_at)
        self._left = min(self._burst, self._left + elapsed * rate)
        self._filled_at += elapsed
