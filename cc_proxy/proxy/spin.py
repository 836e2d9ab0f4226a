"""Waiting for what may come at once: looking again for a moment costs less than being woken."""

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

#: Seconds that a thread looks before it goes to sleep. A wait that is over sooner is a short one.
_MOMENT = 0.000_06
#: A thread looks only after this many short waits in a row. With four, commands of sixteen clients at once took
#: 5 % more CPU, because threads looked while others wanted the GIL.
_IN_A_ROW = 8


class Spin:
    """Waits for one thing, one thread at a time.

    Waking a thread takes 10 to 30 µs, as long as a quick peer needs to answer. So after a few short waits in
    a row the next one begins with looking. Others hardly pay for that: each look gives up the GIL, and if
    another thread takes it, the wait is not short, and the next one does not begin with looking.
    """

    __slots__ = ("_short_waits",)

    def __init__(self) -> None:
        self._short_waits = 0  # in a row

    def wait(self, look: Callable[[], _T | None], sleep: Callable[[], _T]) -> _T:
        """Return what `look` or `sleep` returns: `look` does at once, None if nothing is there yet."""
        until = time.monotonic() + _MOMENT
        found = None
        if self._short_waits >= _IN_A_ROW:
            while (found := look()) is None and time.monotonic() < until:
                pass
        result = sleep() if found is None else found
        self._short_waits = self._short_waits + 1 if time.monotonic() < until else 0
        return result
