"""Waiting for what may come at once: polling for a moment costs less than being woken."""

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

#: Seconds that a thread polls before it goes to sleep. If a single look takes longer, another thread wants
#: the GIL, or another process the CPU.
_SPIN = 0.000_06
#: Seconds after such a look in which no thread polls.
_SHY = 0.005
#: A thread polls only after this many waits in a row, each shorter than `_QUICK` seconds.
_IN_A_ROW = 8
_QUICK = 0.000_2


class Spin:
    """Waits for one thing, one thread at a time.

    Waking a thread takes 10 to 30 µs, as long as a quick peer needs to answer. So after a few short waits in
    a row, the next one begins with polling. Other threads do not pay for that: polling ends as soon as a look
    takes longer than it should.
    """

    __slots__ = ("_short_waits",)

    #: For all threads, since they share the GIL. Any thread sets it without a lock: any value will do.
    _shy_until = 0.0

    def __init__(self) -> None:
        self._short_waits = 0  # in a row

    def wait(self, look: Callable[[], _T | None], sleep: Callable[[], _T]) -> _T:
        """Return what `look` or `sleep` returns. `look` returns at once, None if nothing is there yet."""
        begun = now = time.monotonic()
        if self._short_waits >= _IN_A_ROW and now > Spin._shy_until:
            until = begun + _SPIN
            while now < until:
                found = look()
                looked_at, now = now, time.monotonic()
                if now - looked_at > _SPIN:
                    Spin._shy_until = now + _SHY
                if found is not None:
                    return found
        slept = sleep()
        self._short_waits = self._short_waits + 1 if time.monotonic() - begun < _QUICK else 0
        return slept
