"""The user's terminal, while a process in a VM has it."""

import contextlib
import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cc_proxy.ctl.errors import Interrupted, Misuse
from cc_proxy.ctl.requests import WindowSize

_LFLAG = 3


class Terminal:
    """A terminal that stdin is. Raises `Misuse` if it is none."""

    def __init__(self, fd: int) -> None:
        if not os.isatty(fd):
            raise Misuse("the input device is not a TTY, which -t needs")
        self._fd = fd

    def size(self) -> WindowSize:
        """Return how large its window is now; 0 by 0 is a terminal that does not know, or has hung up."""
        try:
            return WindowSize(*termios.tcgetwinsize(self._fd))
        except termios.error:
            return WindowSize(0, 0)

    @contextmanager
    def raw(self, *, keys_are_signals: bool) -> Iterator[None]:
        """Pass everything through as it is typed and printed; as it was, afterwards.

        With `keys_are_signals`, Ctrl-C and its like remain what they are: the only way out for somebody
        whose keys nobody reads. Raises `Interrupted` if it has hung up.
        """
        try:
            before = termios.tcgetattr(self._fd)
        except termios.error:
            raise Interrupted(signal.SIGHUP) from None
        with contextlib.ExitStack() as stack:
            stack.callback(self._set, before)
            self._set_raw(keys_are_signals)
            yield

    def _set_raw(self, keys_are_signals: bool) -> None:
        with contextlib.suppress(termios.error):
            # At once, not when output has drained: a terminal that nobody reads would block that for ever.
            tty.setraw(self._fd, termios.TCSANOW)
            if keys_are_signals:
                attributes = termios.tcgetattr(self._fd)
                attributes[_LFLAG] |= termios.ISIG
                termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _set(self, attributes: list[Any]) -> None:
        """Set the terminal's mode. One that has hung up is what reading from it will tell."""
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)
