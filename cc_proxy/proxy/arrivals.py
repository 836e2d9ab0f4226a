"""Who waits to be served: each user's in the order in which they came, users in turn. Pure."""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Arrivals(Generic[T]):
    """What users have come with, one turn each: behind a thousand of one user's, another's is the second.

    One thread at a time.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, deque[T]] = {}  # by uid, in the order of their turns; none is empty

    def add(self, uid: int, arrival: T) -> None:
        """Have something wait."""
        self._waiting.setdefault(uid, deque()).append(arrival)

    def take(self) -> T | None:
        """Return what comes next, which then waits no longer; None if nothing waits."""
        for uid in self._waiting:
            mine = self._waiting.pop(uid)
            arrival = mine.popleft()
            if mine:
                self._waiting[uid] = mine
            return arrival
        return None
