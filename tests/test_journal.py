"""The journal: native fields where its library is there, whole lines, and losses that are said."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cc_proxy import journal
from cc_proxy.log import Logging, logger
from tests.test_log import journal_of, logging_as_it_was, piped
from tests.wire.support import wait_until

__all__ = ["logging_as_it_was"]


class Journal:
    """What was sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.down = False
        self.refused = 0

    def send(self, message: str, **fields: object) -> None:
        if self.down:
            self.refused += 1
            raise ConnectionRefusedError(111, "Connection refused")
        self.sent.append({"MESSAGE": message, **fields})


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """A process whose stderr is the journal, with python3-systemd there."""
    found = Journal()
    monkeypatch.setattr(journal, "journal", SimpleNamespace(send=found.send))
    with piped() as (_, stream):
        monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream))
        running = Logging("debug", "auto", stream)
        running.start()
        yield found
        running.stop()


def test_fields_are_native_and_the_message_is_a_json_object(native: Journal) -> None:
    fields = {"vm": "pod\n\0", "client": 3, "stream": None, "vms": ["a"], "nasty": "\ud800"}
    logger.warning("something", extra=fields)
    logger.debug("more")
    _wait_for(native, 2)
    first, second = native.sent
    assert json.loads(first["MESSAGE"]) == {"level": "WARNING", "message": "something", **fields}
    assert "\n" not in first["MESSAGE"]
    assert first["PRIORITY"] == "4"
    assert second["PRIORITY"] == "7"
    assert first["SYSLOG_IDENTIFIER"] == "cc-proxy"
    assert first["CC_VM"] == b"pod\n\0"
    assert first["CC_CLIENT"] == b"3"
    assert first["CC_VMS"] == b'["a"]'
    assert first["CC_NASTY"] == b"\\ud800"
    assert "CC_STREAM" not in first
    assert first["CODE_FILE"] == __file__


def test_journal_that_is_away_loses_lines_and_the_next_says_how_many(native: Journal) -> None:
    native.down = True
    logger.info("lost")
    logger.info("lost")
    wait_until(lambda: native.refused == 2, "both are lost")
    native.down = False
    logger.info("back")
    logger.info("on")
    _wait_for(native, 2)
    back, on = (json.loads(event["MESSAGE"]) for event in native.sent)
    assert back["message"] == "back"
    assert back["lost_before"] == 2
    assert "lost_before" not in on


def test_fields_are_cut_to_what_journalctl_shows(native: Journal) -> None:
    logger.info("event", extra={"vm": "x" * 10_000})
    _wait_for(native, 1)
    assert len(native.sent[0]["CC_VM"]) < 4096
    assert json.loads(native.sent[0]["MESSAGE"])["vm"] == "x" * 10_000


@pytest.mark.parametrize(
    "value", ["😀" * 100_000, ["x" * 50] * 5_000, "\0" * 100_000], ids=["wide", "list", "NULs"]
)
def test_no_line_is_longer_than_the_journal_takes(value: object) -> None:
    stream = io.StringIO()
    running = Logging("info", "json", stream)
    running.start()
    try:
        raise RuntimeError("y" * 100_000)
    except RuntimeError:
        logger.exception("event", extra={"vm": value, "client": 3})
    running.stop()
    (line,) = stream.getvalue().splitlines()
    assert len(line.encode()) < 48 * 1024
    event = json.loads(line)
    assert event["message"] == "event"
    assert event["client"] == 3
    assert len(event["vm"]) > 900
    assert event["exc_info"]


def test_without_the_library_lines_go_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "journal", None)
    with piped() as (near, stream):
        monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream))
        running = Logging("info", "auto", stream)
        running.start()
        logger.error("event")
        running.stop()
        assert os.read(near, 1000).startswith(b"<3>{")


def _wait_for(native: Journal, count: int) -> None:
    wait_until(lambda: len(native.sent) >= count, "sent")
