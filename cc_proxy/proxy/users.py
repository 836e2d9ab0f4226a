"""What is limited for each user: what a user has, and how many requests a second while others are present."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal, Self

from cc_proxy.linux.credentials import ROOT
from cc_proxy.proxy.turns import Turns, Waiter
from cc_proxy.settings import LiveSettings
from cc_proxy.tokens import TokenBucket

#: What is counted, by its name in the settings: for each user and in total.
Thing = Literal["connections", "vms", "sessions", "commands", "request_bytes"]

_CALLED: dict[Thing, str] = {
    "connections": "connections",
    "vms": "VMs",
    "sessions": "sessions",
    "commands": "commands that wait",
    "request_bytes": "bytes of ids, and of messages that are on their way",
}

#: A user who has any of these is present.
_PRESENCE = frozenset({"connections", "vms"})

#: Seconds' worth of requests that a user may make at once. Starting many containers at once is no attack.
_BURST = 5
#: Seconds that a pump waits for the others it takes turns with. One that hangs in a disk must not stop them.
_COURTESY = 0.1
#: No turn at all.
_AT_ONCE = contextlib.nullcontext()
#: Users are remembered until there are this many; then those who have left are forgotten.
_MANY = 64


class LimitReached(Exception):
    """A limit allows no more; the text says which, and whether it is one user's."""


class Charge:
    """Something counted for a user, which is given back once, however often `give_back` is called.

    One thread at a time. A context manager that gives it back at its end.
    """

    __slots__ = ("_number", "_thing", "_user")

    def __init__(self, user: "User", thing: Thing, number: int) -> None:
        self._user = user
        self._thing = thing
        self._number = number

    @property
    def number(self) -> int:
        """How many are counted."""
        return self._number

    def give_back(self) -> None:
        """Count it no more."""
        number, self._number = self._number, 0
        if number:
            self._user.count(self._thing, -number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()


class User:
    """One user, as long as it has connections or VMs. Any thread."""

    def __init__(self, users: "Users", uid: int) -> None:
        self._users = users
        self.uid = uid
        #: Held while a request of the user is decoded, so that a user with a thousand threads competes for
        #: the GIL as one. While it is held, nothing else is locked, and no client is waited for.
        self.decoding = threading.Lock()
        self._batches = Turns[Waiter]()
        #: The requests that the user may make at once, and how much it has of each thing. Both are guarded by
        #: the lock of `Users`.
        self.requests = TokenBucket(_BURST * users.request_rate)
        self.has: Counter[Thing] = Counter()

    @property
    def is_limited(self) -> bool:
        """Whether the user has to leave room for others: not root, and not a user who is alone."""
        return self._users.several and self.uid != ROOT

    def delay(self, requests: int = 1) -> float:
        """Count requests; returns the seconds that the last of them has to wait for its turn."""
        return self._users.delay(self, requests) if self.is_limited else 0.0

    def note_connection(self) -> None:
        """Count a connection as a request, so that the next real request waits longer.

        Connecting itself never waits, so a user who connected all day would owe days of waiting. Connections
        no longer count once the user owes as much as it may ask for at once.
        """
        if self.delay(0) < _BURST:
            self.delay()

    def charge(self, thing: Thing, number: int = 1) -> Charge:
        """Count some more of something. Raises `LimitReached`, and then nothing is counted."""
        self.count(thing, number)
        return Charge(self, thing, number)

    def charge_again(self, thing: Thing, number: int = 1) -> Charge:
        """Count what was counted in the previous process, whatever the limits say."""
        self._users.count(self, thing, number, within_limits=False)
        return Charge(self, thing, number)

    def count(self, thing: Thing, number: int) -> None:
        """Count more of something, or less. Raises `LimitReached`. For `Charge`; others use `charge`."""
        self._users.count(self, thing, number)

    def one_batch(self, large: bool) -> AbstractContextManager[None]:
        """Let one of the user's pumps work at a time, so that many VMs compete for the GIL as one thread.

        A batch that is not `large` need not wait, unless the user `is_limited`: waking for its turn would
        take longer than the batch.
        """
        return self._turn() if large or self.is_limited else _AT_ONCE

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """This is a courtesy and no lock: a pump that has waited for another one too long goes ahead."""
        turns, waiter = self._batches, Waiter()
        mine = turns.get(waiter, time.monotonic() + _COURTESY)
        if not mine and turns is self._batches:
            self._batches = Turns()  # so that no pump waits again for the one that hangs
        try:
            yield
        finally:
            if mine and (following := turns.next()):
                following.turn.release()


class Users:
    """All users who are present, and the limits that the current settings set. Any thread."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._lock = threading.Lock()  # guards all that follows, and what `User` names; innermost
        self._users: dict[int, User] = {}  # by uid
        self._forget_at = _MANY
        self._total: Counter[Thing] = Counter()
        self._present: Counter[int] = Counter()  # connections and VMs, by uid
        #: Whether more than one user is present. Any thread reads it without the lock.
        self.several = False

    def of(self, uid: int) -> User:
        """Return a user: the same object as long as the user is present, or owes requests."""
        with self._lock:
            user = self._users.get(uid)
            if user is None:
                if len(self._users) >= self._forget_at:
                    self._forget()
                user = self._users[uid] = User(self, uid)
        return user

    def _forget(self) -> None:
        """Forget users who have nothing and owe no requests. Requires _lock."""
        rate, now = self.request_rate, time.monotonic()
        self._users = {
            uid: user
            for uid, user in self._users.items()
            if user.has.total() or not user.requests.full(rate, now)
        }
        self._forget_at = max(_MANY, 2 * len(self._users))

    def delay(self, user: User, requests: int) -> float:
        """Count requests of a user; returns the seconds that the last of them has to wait for its turn."""
        with self._lock:
            return user.requests.take(requests, self.request_rate, time.monotonic())

    def count(self, user: User, thing: Thing, number: int, *, within_limits: bool = True) -> None:
        """Count more of something for a user, or less. Raises `LimitReached`, and then nothing changes."""
        limits = self._live.current.limits
        total, each = getattr(limits, thing), getattr(limits.user, thing)
        with self._lock:
            if number > 0 and within_limits:
                if self._total[thing] + number > total:
                    raise LimitReached(f"the limit of {total} {_CALLED[thing]} is reached")
                if user.uid != ROOT and user.has[thing] + number > each:
                    raise LimitReached(f"the limit of {each} {_CALLED[thing]} for one user is reached")
            user.has[thing] += number
            self._total[thing] += number
            assert user.has[thing] >= 0, f"{-number} {thing} of user {user.uid} are given back too often"
            if thing in _PRESENCE:
                self._present[user.uid] += number
                if not self._present[user.uid]:
                    del self._present[user.uid]
                self.several = len(self._present) > 1

    def state(self) -> dict[int, float]:
        """Return how many requests each user may make at once, negative if it owes some, by uid."""
        rate, now = self.request_rate, time.monotonic()
        with self._lock:
            return {uid: user.requests.left(rate, now) for uid, user in self._users.items()}

    def restore(self, state: dict[int, float]) -> None:
        """Go on where the previous process stood. Call it before there are users."""
        now = time.monotonic()
        for uid, left in state.items():
            self.of(uid).requests.restore(left, now)

    @property
    def request_rate(self) -> int:
        """Requests a second that a user may go on with while others are present."""
        return self._live.current.limits.user.request_rate

    def all(self) -> list[User]:
        """Return the users who have anything, by uid."""
        with self._lock:
            return sorted(
                (user for user in self._users.values() if user.has.total()), key=lambda user: user.uid
            )
