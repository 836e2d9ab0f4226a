"""Waiting for what may come at once: to look again for a moment costs less than to be woken."""

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

#: Seconds that it is looked for something before the thread goes to sleep.
_SPIN = 0.000_06
#: Seconds in which it has come the last time, if it is looked for at all: others who wait take longer.
_QUICK = 0.000_2
#: One look takes much less, in seconds, unless somebody else wants the interpreter, or the CPU; then that is
#: left to them for a while.
_LONG_LOOK = 0.000_02
_SHY = 0.005


class Eager:
    """Waits for one thing, one thread at a time.

    To be woken takes a thread 10 to 30 µs, as long as a quick peer needs to answer. So after a wait that was
    short, the next one begins with looking. Nobody else is to pay for that: it ends as soon as a look takes
    longer than it should.
    """

    __slots__ = ("_quick",)

    #: For all, as there is one interpreter. Any thread's, without a lock: the last one is as right as any.
    _shy_until = 0.0

    def __init__(self) -> None:
        self._quick = False

    def wait(self, look: Callable[[], _T | None], sleep: Callable[[], _T]) -> _T:
        """Return what `look` or `sleep` returns: `look` does at once, None if nothing is there yet."""
        begun = now = time.monotonic()
        if self._quick and now > Eager._shy_until:
            until = begun + _SPIN
            while now < until:
                found = look()
                looked_at, now = now, time.monotonic()
                if now - looked_at > _LONG_LOOK:
                    Eager._shy_until = now + _SHY
                    until = now
                if found is not None:
                    return found
        slept = sleep()
        self._quick = time.monotonic() - begun < _QUICK
        return slept
