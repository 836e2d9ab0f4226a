"""Signals: waiting for them, and letting them interrupt a request that takes long."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from cc_proxy.ctl.errors import Interrupted

#: Signals that end this command, unless it passes them on to the process.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

#: Those with which people and service managers ask a command to stop.
STOPPING = frozenset({signal.SIGINT, signal.SIGTERM})

_CAUGHT = (*ENDING, signal.SIGWINCH)
#: How many signals to take from the pipe at once.
_MANY = 512
#: This many signals of `STOPPING` within `_SOON` seconds end the command, whatever the process does.
_INSISTENT = 3
_SOON = 5.0
#: Seconds that each step of cleaning up may take after that.
_LAST_GRACE = 0.5


class Signals:
    """Catches `ENDING` and SIGWINCH as long as the context lasts. Main thread only.

    Signals wait in a pipe until `take` fetches them; `fileno` is readable while there are any. Those that
    were ignored when the command began (nohup, a background job of a script) stay ignored.

    A signal interrupts nothing, except inside `may_interrupt` and `may_be_cut_short`.
    """

    def __init__(self) -> None:
        self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._old_wakeup = -1
        self._reader = self._writer = -1
        self._ending = 0
        self._last = 0
        #: Called for each signal of `ENDING`; returns whether it interrupts. None if no signal does.
        self._interrupts: Callable[[], bool] | None = None
        self._stopping: deque[float] = deque(maxlen=_INSISTENT)
        #: Whether the user insists on an end: `_INSISTENT` signals of `STOPPING` came within `_SOON` seconds.
        self.insistent = False

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        # Python's C handler writes each signal to it, so one that comes just before poll(2) still ends that.
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
        """Return an fd that is readable while signals wait."""
        return self._reader

    def take(self) -> list[int]:
        """Return the signals that have arrived since the last call, in order, each of them once."""
        try:
            caught = os.read(self._reader, _MANY)
        except BlockingIOError:
            caught = b""
        self._ending = 0
        return [signum for signum in dict.fromkeys(caught) if signum in _CAUGHT]

    @contextmanager
    def may_interrupt(self, *, tolerate: int = 0) -> Iterator[None]:
        """Raise `Interrupted` inside, once more than `tolerate` signals of `ENDING` have come since `take`.

        It may be raised anywhere inside, so nothing may be done there that has to be undone.
        """

        def too_many() -> bool:
            return self._ending > tolerate

        with self._interrupted_if(too_many):
            if too_many():
                raise Interrupted(self._last)
            yield

    def may_be_cut_short(self) -> AbstractContextManager[None]:
        """For cleaning up: raise `Interrupted` inside at the signal with which the user gets `insistent`."""
        return self._interrupted_if(lambda: self.insistent)

    def grace(self, seconds: float) -> float:
        """Return how many seconds a step of cleaning up may take: fewer if the user is `insistent`."""
        return _LAST_GRACE if self.insistent else seconds

    @contextmanager
    def _interrupted_if(self, interrupts: Callable[[], bool]) -> Iterator[None]:
        self._interrupts = interrupts
        try:
            yield
        finally:
            self._interrupts = None

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGWINCH:
            return
        self._ending += 1
        self._last = signum
        if signum in STOPPING:
            self._stopping.append(time.monotonic())
            in_a_row = self._stopping[-1] - self._stopping[0] <= _SOON
            self.insistent = self.insistent or (len(self._stopping) == _INSISTENT and in_a_row)
        if self._interrupts and self._interrupts():
            # Only once: the clean-up that follows must not be interrupted again.
            self._interrupts = None
            raise Interrupted(signum)
