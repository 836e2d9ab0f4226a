"""Signals as something to wait for, and as the end of a request that takes too long."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from cc_proxy.ctl.errors import Interrupted

#: What would end this command, and is the container's to decide about instead.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_CAUGHT = (*ENDING, signal.SIGWINCH)
_MANY = 512


class Signals:
    """Catches `ENDING` and SIGWINCH for as long as the context lasts. Main thread only.

    They wait in a pipe until `take` fetches them; `fileno` is readable while there are any. What was
    ignored when the command began (nohup, a background job of a script) stays ignored.

    Nothing is ever interrupted, except inside `may_interrupt`.
    """

    def __init__(self) -> None:
        self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._old_wakeup = -1
        self._reader = self._writer = -1
        self._ending = 0
        self._last = 0
        #: So many ending signals may come before one interrupts; None: none does.
        self._tolerated: int | None = None

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        # Written by the C handler itself: a signal just before poll(2) is not slept over.
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for signum in _CAUGHT:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """The fd that is readable while signals wait."""
        return self._reader

    def take(self) -> list[int]:
        """Return the signals that came since the last call, in their order, repeated ones once."""
        try:
            caught = os.read(self._reader, _MANY)
        except BlockingIOError:
            caught = b""
        self._ending = 0
        return [signum for signum in dict.fromkeys(caught) if signum in _CAUGHT]

    @contextmanager
    def may_interrupt(self, *, tolerate: int = 0) -> Iterator[None]:
        """Have an ending signal raise `Interrupted` inside, once more than `tolerate` have come.

        It may be raised anywhere inside, so there must be nothing there that has to be undone.
        """
        self._tolerated = tolerate
        if self._ending > tolerate:
            self._tolerated = None
            raise Interrupted(self._last)
        try:
            yield
        finally:
            self._tolerated = None

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGWINCH:
            return
        self._ending += 1
        self._last = signum
        if self._tolerated is not None and self._ending > self._tolerated:
            # Once: the clearing up that follows must not be interrupted again.
            self._tolerated = None
            raise Interrupted(signum)
