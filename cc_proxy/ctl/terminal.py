"""The user's terminal, while a process in a VM uses it."""

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
    """The terminal behind an fd. Raises `Misuse` if the fd is not a terminal."""

    def __init__(self, fd: int) -> None:
        if not os.isatty(fd):
            raise Misuse("the input device is not a TTY, which -t needs")
        self._fd = fd

    def size(self) -> WindowSize:
        """Return the size of the window; 0 by 0 if the terminal does not know it, or has hung up."""
        try:
            return WindowSize(*termios.tcgetwinsize(self._fd))
        except termios.error:
            return WindowSize(0, 0)

    @contextmanager
    def raw(self, *, keys_are_signals: bool) -> Iterator[None]:
        """Put the terminal into raw mode as long as the context lasts.

        With `keys_are_signals`, Ctrl-C and the like still send signals: while nobody reads the keys, the user
        could not get out otherwise. Raises `Interrupted` if the terminal has hung up.
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
            # TCSANOW: to wait until output has drained would block for ever on a terminal that nobody reads.
            tty.setraw(self._fd, termios.TCSANOW)
            if keys_are_signals:
                attributes = termios.tcgetattr(self._fd)
                attributes[_LFLAG] |= termios.ISIG
                termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _set(self, attributes: list[Any]) -> None:
        """Set the terminal's mode. If the terminal has hung up, that is noticed when it is read."""
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)
