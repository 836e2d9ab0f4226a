"""Fixtures of the tests of cc-proxyctl."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ctl.fake_proxy import FakeProxy
from tests.ctl.window import Window


@pytest.fixture
def proxy(tmp_sock_dir: Path) -> Iterator[FakeProxy]:
    """A proxy to be scripted."""
    with FakeProxy(tmp_sock_dir / "proxy.sock") as proxy:
        yield proxy


@pytest.fixture
def window() -> Iterator[Window]:
    user, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    window = Window(user, terminal)
    yield window
    if window.user >= 0:
        window.hang_up()
    os.close(terminal)
