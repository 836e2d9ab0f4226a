"""The journal: native fields where it takes them, whole lines, and losses that are said."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.log import journal
from cc_proxy.log.levels import logger
from cc_proxy.log.writing import Logging
from tests.log.losing import lost
from tests.log.test_writing import journal_of, piped
from tests.wire.support import wait_until

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


class FakeJournal:
    """A journal's socket, and what logs there."""

    log: Logging

    def __init__(self, path: str) -> None:
        self.path = path
        self.start()

    def start(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self.sock.settimeout(10)

    def stop(self) -> None:
        self.sock.close()
        os.unlink(self.path)

    def receive(self) -> dict[str, bytes]:
        """Returns the fields of the next event."""
        return dict(fields_in(self.sock.recv(1_000_000)))


def fields_in(datagram: bytes) -> Iterator[tuple[str, bytes]]:
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        (size,) = struct.unpack("<Q", rest[:8])
        assert rest[8 + size : 9 + size] == b"\n"
        yield name.decode(), rest[8 : 8 + size]
        datagram = rest[9 + size :]


@pytest.fixture
def native(tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJournal]:
    """What takes native fields, from a process whose stderr is the journal."""
    found = FakeJournal(str(tmp_sock_dir / "journal"))
    monkeypatch.setattr(journal, "SOCKET", found.path)
    with piped() as (_, stream):
        monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream))
        found.log = Logging("debug", "auto", stream)
        found.log.start()
        yield found
        found.log.stop()
        found.stop()


def test_fields_are_native_and_the_message_is_a_json_object(native: FakeJournal) -> None:
    fields = {"vm": "pod\n\0", "client": 3, "stream": None, "vms": ["a"], "nasty": "\ud800"}
    logger.warning("something", extra=fields)
    logger.debug("more")
    first, second = native.receive(), native.receive()
    assert json.loads(first["MESSAGE"]) == {"level": "WARNING", "message": "something", **fields}
    assert b"\n" not in first["MESSAGE"]
    assert first["PRIORITY"] == b"4"
    assert second["PRIORITY"] == b"7"
    assert first["SYSLOG_IDENTIFIER"] == b"cc-proxy"
    assert first["CC_VM"] == rb"pod\n\x00"
    assert first["CC_CLIENT"] == b"3"
    assert first["CC_VMS"] == b'["a"]'
    assert first["CC_NASTY"] == b"\\ud800"
    assert "CC_STREAM" not in first
    assert first["CODE_FILE"] == __file__.encode()


def test_journal_that_is_away_loses_lines_and_the_next_says_how_many(native: FakeJournal) -> None:
    native.stop()
    logger.info("lost")
    logger.info("lost")
    wait_until(lambda: lost(native.log) == 2, "both are lost")
    native.start()
    logger.info("back")
    logger.info("on")
    back, on = (json.loads(native.receive()["MESSAGE"]) for _ in range(2))
    assert back["message"] == "back"
    assert back["lost_before"] == 2
    assert "lost_before" not in on


def test_journal_that_takes_nothing_holds_nobody_up(native: FakeJournal) -> None:
    for number in range(2_000):  # more than its socket holds
        logger.debug("event", extra={"number": number})
    numbers = [json.loads(native.receive()["MESSAGE"])["number"] for _ in range(2_000)]
    assert numbers == list(range(2_000))


def test_fields_speak_to_no_terminal(native: FakeJournal) -> None:
    logger.info("event", extra={"vm": "a\x1b[2J\nMESSAGE=forged\u202e"})
    assert native.receive()["CC_VM"] == rb"a\x1b[2J\nMESSAGE=forged\u202e"


def test_fields_are_cut_to_what_journalctl_shows(native: FakeJournal) -> None:
    logger.info("event", extra={"vm": ["x" * 70] * 100})
    event = native.receive()
    assert len(event["CC_VM"]) < 4096
    assert json.loads(event["MESSAGE"])["vm"] == ["x" * 70] * 100


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


def test_without_the_socket_lines_go_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SOCKET", "/nonexistent/socket")
    with piped() as (near, stream):
        monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream))
        running = Logging("info", "auto", stream)
        running.start()
        logger.error("event")
        running.stop()
        assert os.read(near, 1000).startswith(b"<3>{")
