"""Fixtures of all tests."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.log.levels import logger

# So that an assertion of a helper says what it got, as one of a test does.
pytest.register_assert_rewrite("tests.agent", "tests.ctl", "tests.proxy", "tests.systemd", "tests.wire")

pytest_plugins = ["tests.connector", "tests.guest.image", "tests.leaks", "tests.locks"]


def pytest_configure() -> None:
    """Undo what nohup or a background job has done: programs that are tested would inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


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


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """For tests that change how the project logs."""
    before = logger.level, logger.propagate, list(logger.handlers), logging.raiseExceptions
    yield
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers[:] = before[2]
    logging.raiseExceptions = before[3]
