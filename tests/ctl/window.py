"""A terminal with a user in front of it."""

from __future__ import annotations

import os
import subprocess
import termios
from dataclasses import dataclass
from typing import Any

from tests.ctl.running import popen, take_terminal

_OFLAG, LFLAG = 1, 3


@dataclass
class Window:
    """A terminal with a user in front of it."""

    user: int
    terminal: int

    def mode(self) -> list[Any]:
        return termios.tcgetattr(self.terminal)

    def start(self, socket_path: str, *argv: str) -> subprocess.Popen[bytes]:
        """Start the command with this as its controlling terminal."""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self.terminal)
        return popen(socket_path, *argv, **streams, start_new_session=True, preexec_fn=take_terminal)

    def hang_up(self) -> None:
        os.close(self.user)
        self.user = -1

    def is_raw(self) -> bool:
        mode = self.mode()
        return not mode[LFLAG] & (termios.ICANON | termios.ECHO) and not mode[_OFLAG] & termios.OPOST
