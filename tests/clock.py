"""A clock that goes when it is told to."""


class Clock:
    """Stands in for the module `time`: time passes only while somebody sleeps, or is set."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
