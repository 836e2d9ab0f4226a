"""Fixtures of all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.leaks", "tests.locks"]


@pytest.fixture
def tmp_sock_dir() -> Iterator[Path]:
    """A directory for sockets: pytest's tmp_path can be longer than the 107 bytes of an AF_UNIX path."""
    with tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory for sockets in which every user finds everything."""
    with tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as path:
        os.chmod(path, 0o755)  # noqa: S103 - that is what it is for
        yield Path(path)
