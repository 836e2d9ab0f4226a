"""Waiting for what may come at once: to look again for a moment costs less than to be woken."""

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

#: Seconds that it is looked for something before the thread goes to sleep.
_SPIN = 0.000_06
#: Seconds in which it has come so many times in a row, if it is looked for at all.
_QUICK = 0.000_2
_IN_A_ROW = 4
#: One look takes much less, in seconds, unless somebody else wants the interpreter, or the CPU; then that is
#: left to them for a while.
_LONG_LOOK = 0.000_03
_SHY = 0.005


class Spin:
    """Waits for one thing, one thread at a time.

    To be woken takes a thread 10 to 30 µs, as long as a quick peer needs to answer. So after a few short
    waits in a row the next one begins with looking. Nobody else is to pay for that: it ends as soon as a look
    takes longer than it should.
    """

    __slots__ = ("_short_waits",)

    #: For all, as there is one interpreter. Any thread's, without a lock: the last one is as right as any.
    _shy_until = 0.0

    def __init__(self) -> None:
        self._short_waits = 0  # in a row

    def wait(self, look: Callable[[], _T | None], sleep: Callable[[], _T]) -> _T:
        """Return what `look` or `sleep` returns: `look` does at once, None if nothing is there yet."""
        begun = now = time.monotonic()
        if self._short_waits >= _IN_A_ROW and now > Spin._shy_until:
            until = begun + _SPIN
            while now < until:
                found = look()
                looked_at, now = now, time.monotonic()
                if now - looked_at > _LONG_LOOK:
                    Spin._shy_until = now + _SHY
                    until = now
                if found is not None:
                    return found
        slept = sleep()
        self._short_waits = self._short_waits + 1 if time.monotonic() - begun < _QUICK else 0
        return slept
