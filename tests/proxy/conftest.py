"""What these tests are given: the log as records, a spool directory, a pump."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cc_proxy.linux import fds
from cc_proxy.linux.fds import Piece, cut
from cc_proxy.log.levels import fields_of, logger
from cc_proxy.proxy import users
from cc_proxy.proxy.streams import channel, pacer, session, stats, stdin
from cc_proxy.proxy.streams.spool import SpoolSpace
from tests.clock import Clock
from tests.proxy.house import Answering, House
from tests.proxy.support import BLOCK, Rig, spool_space


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
def file_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A disk that is full once a file has this many bytes."""
    limit = 16 * BLOCK
    write = os.pwritev

    def write_what_fits(fd: int, pieces: Sequence[Piece], at: int) -> int:
        if at >= limit:
            raise OSError(28, "No space left on device")
        return write(fd, cut(pieces, 0, limit - at), at)

    monkeypatch.setattr(os, "pwritev", write_what_fits)
    return limit


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
    for module in (channel, fds, pacer, session, stats, stdin, users):
        monkeypatch.setattr(module, "time", clock)
    return clock
