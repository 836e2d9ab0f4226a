"""What these tests are given: the log as records, a spool directory, a pump."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.linux import fds
from cc_proxy.log.levels import fields_of, logger
from cc_proxy.proxy import users
from cc_proxy.proxy.streams import channel, pacer, session, stats, stdin
from cc_proxy.proxy.streams.spool import SpoolSpace
from tests.clock import Clock
from tests.proxy.house import Answering, House
from tests.proxy.support import BLOCK, Rig, spool_space
from tests.shortages import small_disk


class Logged(logging.Handler):
    """The project's log, as records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def at(self, level: int) -> list[str]:
        """The texts of what was logged at `level` or above."""
        return [record.getMessage() for record in self.records if record.levelno >= level]

    def fields(self, text: str) -> list[dict[str, object]]:
        """The fields of each event with this text."""
        return [fields_of(record) for record in self.records if record.getMessage() == text]


@pytest.fixture
def logged() -> Iterator[Logged]:
    """What is logged at debug and above."""
    handler = Logged()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.fixture
def space(tmp_path: Path) -> SpoolSpace:
    """A spool that nobody fills up."""
    return spool_space(tmp_path)


@pytest.fixture
def rig(space: SpoolSpace) -> Iterator[Rig]:
    """A pump that runs, without pacing."""
    with Rig(space) as rig:
        yield rig


@pytest.fixture
def disk_size(tmp_path: Path) -> Iterator[int]:
    """How many bytes the disk has that is at `tmp_path`."""
    size = 16 * BLOCK
    with small_disk(tmp_path, f"size={size}"):
        yield size


@pytest.fixture
def house(tmp_sock_dir: Path) -> Iterator[House]:
    house = House(tmp_sock_dir)
    yield house
    house.close()


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Answering:
    return Answering(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the streams and of users."""
    clock = Clock()
    clock.rule(monkeypatch, channel, fds, pacer, session, stats, stdin, users)
    return clock
