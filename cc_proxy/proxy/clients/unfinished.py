"""A request or response on its way: its deadline, and its bytes."""

import time

from cc_proxy.proxy.users import Charge, User
from cc_proxy.settings import LiveSettings

#: Requests and responses with more bytes than this count against `request_bytes` as long as they last. So no
#: more is read of a request before it is counted. Those of clients in the field are shorter.
UNCOUNTED = 4 * 1024


class Unfinished:
    """When a message has to be complete, and what it counts for. One thread at a time."""

    def __init__(self, user: User, live: LiveSettings) -> None:
        self._user = user
        self._live = live
        self._deadline: float | None = None
        self._charge: Charge | None = None

    def begin(self, *, anew: bool = False) -> float:
        """Return its deadline (`time.monotonic`); set one if it has none, or begins `anew`."""
        if self._deadline is None or anew:
            self._deadline = time.monotonic() + self._live.current.limits.message_timeout
        return self._deadline

    def end(self) -> None:
        """The message is complete: it has no deadline any more."""
        self._deadline = None

    def count(self, size: int) -> None:
        """Count its bytes, unless they are counted already. Raises `LimitReached`."""
        if self._charge is None:
            self._charge = self._user.charge("request_bytes", size)

    def uncount(self) -> None:
        """Count its bytes no more, if they are counted."""
        if self._charge:
            self._charge.give_back()
            self._charge = None

    def hand_over(self) -> tuple[float | None, int]:
        """Return the seconds that are left, and the bytes that count, for `restore`."""
        left = None if self._deadline is None else self._deadline - time.monotonic()
        return left, self._charge.number if self._charge else 0

    def restore(self, left: float | None, counted: int) -> None:
        """Go on where the previous process stood."""
        self._deadline = None if left is None else time.monotonic() + left
        if counted:
            self._charge = self._user.charge_again("request_bytes", counted)
