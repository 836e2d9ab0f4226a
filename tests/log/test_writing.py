"""The log: fields of their own, lines that nothing can break, and nobody who waits for its reader."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import resource
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO, get_args

import pytest

from cc_proxy.log.levels import (
    CONSOLE,
    IO,
    LEVELS,
    VERBOSE,
    LogFormat,
    LogLevel,
    fields_of,
    logger,
    priority_of,
)
from cc_proxy.log.writing import Logging, stderr_is_journal
from tests.log.losing import lost
from tests.wire.support import WAIT, in_background, wait_until

pytestmark = pytest.mark.usefixtures("logging_as_it_was")

NASTY = "\x1b[31m\r\n\x07\x00\x7f\x9b\u2028\u202e\ufeff\"'\\ é😀"


@contextmanager
def running(stream: TextIO, level: LogLevel = "console", form: LogFormat = "json") -> Iterator[None]:
    log = Logging(level, form, stream)
    log.start()
    try:
        yield
    finally:
        log.stop()


def lines_of(
    level: LogLevel = "console", form: LogFormat = "json", *, text: str, **fields: object
) -> list[str]:
    """What one event is in the log."""
    stream = io.StringIO()
    with running(stream, level, form):
        logger.error(text, extra=fields)
    return stream.getvalue().splitlines(keepends=True)


# Lines ----------------------------------------------------------------------------------------------------


def test_event_is_an_object_with_its_fields() -> None:
    fields: dict[str, Any] = {"vm": "pod", "stream": 3, "none": None, "list": ["a", 1], "payload": NASTY}
    (line,) = lines_of(text="something happened", **fields)
    assert line.endswith("}\n")
    assert line.isascii()
    event = json.loads(line)
    assert event.pop("timestamp")
    assert event == {"level": "ERROR", "message": "something happened"} | fields


def test_whatever_a_field_holds_is_one_line() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd\n"

    for value in (
        b"bytes\n\xff",
        object(),
        Odd(),
        {1: 2},
        {"a": {"b": [None]}},
        float("inf"),
        ValueError("x\ny"),
    ):
        for form in get_args(LogFormat):
            (line,) = lines_of(form=form, text="event", value=value)
            assert "value" in line


@pytest.mark.parametrize("form", get_args(LogFormat))
def test_no_character_breaks_a_line_or_speaks_to_the_terminal(form: LogFormat) -> None:
    stream = io.StringIO()
    codes = [*range(32), *range(127, 160), 0x2028, 0x2029, 0x202E, 0xFEFF]
    with running(stream, form=form):
        for code in codes:
            logger.error("event", extra={"field": f"<{chr(code)}>"})
    lines = stream.getvalue().split("\n")
    assert len(lines) == len(codes) + 1
    assert all(32 <= ord(character) < 127 for line in lines for character in line)


def test_text_is_for_people() -> None:
    (line,) = lines_of(form="text", text="VM registered", vm="pod", stream=3, error=NASTY)
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d\d\d ERROR   VM registered vm="pod" stream=3 error="\\u001b\[31m\\r\\n.*"\n', line
    )


def test_stack_is_shown_as_lines() -> None:
    lines = lines_of(form="text", text="stack", stack="  File x\n    call()\x1b\n", count=1)
    assert "".join(lines).endswith(" stack count=1\n      File x\n        call()\\x1b\n")


@pytest.mark.parametrize("form", get_args(LogFormat))
def test_error_cannot_forge_a_line(form: LogFormat) -> None:
    """What an exception says may be what a client said."""
    stream = io.StringIO()
    with running(stream, form=form):
        try:
            raise ValueError("x\n12:00:00.000 INFO    VM registered\x1b[2J\u202e\r")
        except ValueError:
            logger.exception("it failed")
    first, *rest = stream.getvalue().removesuffix("\n").split("\n")
    assert "it failed" in first
    assert first.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("form", get_args(LogFormat))
def test_errors_carry_their_traceback(form: LogFormat) -> None:
    stream = io.StringIO()
    with running(stream, form=form):
        try:
            raise KeyError("nobody expects it")
        except KeyError:
            logger.exception("it failed", extra={"vm": "pod"})
    text = stream.getvalue()
    assert "Traceback (most recent call last)" in text
    assert "nobody expects it" in text
    if form != "text":
        assert json.loads(text)["vm"] == "pod"


def test_fields_are_what_was_given_and_nothing_else() -> None:
    record = logging.LogRecord("cc_proxy", logging.INFO, __file__, 1, "text %s", ("x",), None)
    record.taskName = None
    assert fields_of(record) == {}
    record.vm = "pod"
    assert fields_of(record) == {"vm": "pod"}


# Levels and formats ---------------------------------------------------------------------------------------


def test_levels_are_those_of_the_settings() -> None:
    assert tuple(LEVELS) == get_args(LogLevel)
    assert sorted(LEVELS.values(), reverse=True) == list(LEVELS.values())
    assert VERBOSE == {0: "info", 1: "debug", 2: "io", 3: "console"}


@pytest.mark.parametrize("level", get_args(LogLevel))
def test_what_is_below_the_level_is_not_logged(level: LogLevel) -> None:
    stream = io.StringIO()
    with running(stream, level):
        for number in LEVELS.values():
            logger.log(number, "event")
    logged = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert logged == [name.upper() for name, number in LEVELS.items() if number >= LEVELS[level]]


def test_level_can_be_changed_while_it_runs() -> None:
    stream = io.StringIO()
    log = Logging("error", "json", stream)
    log.start()
    logger.info("not this")
    log.set_level("info")
    logger.info("this")
    log.stop()
    logger.error("nor this")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["this"]


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, 3),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
        (logging.DEBUG, 7),
        (IO, 7),
        (CONSOLE, 7),
        (1, 7),
    ],
)
def test_priorities_are_syslogs(level: int, priority: int) -> None:
    assert priority_of(level) == priority


@contextmanager
def piped(*, terminal: bool = False) -> Iterator[tuple[int, TextIO]]:
    near, far = pty.openpty() if terminal else os.pipe()
    try:
        with open(far, "w", encoding="utf-8") as stream:
            yield near, stream
    finally:
        os.close(near)


def journal_of(stream: TextIO, *, inode: int = 0) -> str:
    status = os.fstat(stream.fileno())
    return f"{status.st_dev}:{status.st_ino + inode}"


def test_lines_for_the_journal_carry_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped() as (near, stream):
        monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream))
        assert stderr_is_journal(stream)
        with running(stream, form="auto"):
            for level in (logging.ERROR, logging.WARNING, logging.INFO, CONSOLE):
                logger.log(level, "event\n", extra={"field": "\n<0>"})
        lines = os.read(near, 10_000).decode().splitlines()
    assert [line[:4] for line in lines] == ["<3>{", "<4>{", "<6>{", "<7>{"]
    assert all("timestamp" not in json.loads(line[3:]) for line in lines), "the journal has its own"


@pytest.mark.parametrize("value", ["", "nonsense", "1:2", None])
def test_stderr_that_is_not_the_journal(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    else:
        monkeypatch.setenv("JOURNAL_STREAM", value)
    with piped() as (_, stream):
        assert not stderr_is_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", journal_of(stream, inode=1))
        assert not stderr_is_journal(stream), "it was redirected since"
    assert not stderr_is_journal(io.StringIO())


@pytest.mark.parametrize(
    ("form", "terminal", "is_json"),
    [
        ("auto", True, False),
        ("auto", False, True),
        ("json", True, True),
        ("json", False, True),
        ("text", True, False),
        ("text", False, False),
    ],
)
def test_format(form: LogFormat, terminal: bool, is_json: bool) -> None:
    with piped(terminal=terminal) as (near, stream):
        with running(stream, form=form):
            logger.error("event")
        assert os.read(near, 1_000).startswith(b"{") == is_json


# Who logs does not wait -----------------------------------------------------------------------------------


class Stalled(io.StringIO):
    """A log that nobody reads for now."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        assert self.goes_on.wait(WAIT)
        return super().write(text)


#: How many events may wait that have a number and nothing else: 4 MiB, of a kibibyte each.
MOST_WAITING = 4_096


def test_lines_that_do_not_fit_are_counted_and_the_next_one_says_so() -> None:
    stream = Stalled()
    log = Logging("debug", "json", stream)
    log.start()
    logger.debug("the first")
    assert stream.reached.wait(WAIT)
    for number in range(MOST_WAITING + 7):
        logger.debug("event", extra={"number": number})
    stream.goes_on.set()
    wait_until(lambda: stream.getvalue().count("\n") == MOST_WAITING + 1, "all that waited is written")
    logger.debug("after that")
    logger.debug("and on")
    log.stop()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["number"] for event in events[1:-2]] == list(range(MOST_WAITING))
    assert events[-2]["message"] == "after that"
    assert events[-2]["dropped_before"] == 7
    assert "dropped_before" not in events[-1]


def test_stop_while_the_queue_is_full_writes_all_that_waits() -> None:
    """Or a daemon whose log is read slowly ends with a traceback."""
    stream = Stalled()
    log = Logging("debug", "json", stream)
    log.start()
    logger.debug("the first")
    assert stream.reached.wait(WAIT)
    for _ in range(MOST_WAITING):
        logger.debug("event")
    ended = threading.Event()
    results: list[bool] = []

    def stop() -> None:
        try:
            results.append(log.stop())
        finally:
            ended.set()

    try:
        with in_background(stop):
            ended.wait(0.05)  # it finds the queue full
            stream.goes_on.set()
        wait_until(lambda: stream.getvalue().count("\n") > MOST_WAITING, "all that waited is written")
        assert results, "it ended without an error"
    finally:
        if results != [True]:
            log.stop()


def test_events_that_wait_are_bounded_in_bytes() -> None:
    """A client's id may be a megabyte long, and is in the line that says what was refused."""
    stream = Stalled()
    log = Logging("debug", "json", stream)
    log.start()
    logger.info("the first")
    assert stream.reached.wait(WAIT)
    tracemalloc.start()
    try:
        for number in range(200):
            logger.debug("refused", extra={"vm": f"{number}" + "x" * 1_000_000, "error": "y" * 1_000_000})
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2_000_000
    for _ in range(20_000):
        logger.debug("event", extra={"list": ["z" * 100] * 10})
    stream.goes_on.set()
    assert log.stop()
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) < 4_000
    assert 4_000_000 > len(stream.getvalue()) > 1_000_000


def test_traceback_that_waits_keeps_nothing_alive() -> None:
    class Big:
        pass

    def fail(big: Big) -> None:
        raise ValueError

    stream, big = Stalled(), Big()
    gone = weakref.ref(big)
    log = Logging("info", "json", stream)
    log.start()
    logger.info("the first")
    assert stream.reached.wait(WAIT)
    try:
        fail(big)
    except ValueError:
        logger.exception("it failed")
    del big
    assert gone() is None
    stream.goes_on.set()
    assert log.stop()
    assert "ValueError" in stream.getvalue()


def test_closed_stderr_keeps_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log = Logging("info", "auto")
    log.start()
    tracemalloc.start()
    try:
        for number in range(1_900):  # as many as may wait
            logger.log(logging.INFO, f"event {number}", extra={"text": "x" * 1_000})
        assert log.stop()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_000_000


def test_line_after_a_full_disk_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as stream:
        log = Logging("info", "json", stream)
        log.start()
        logger.info("before")
        wait_until(lambda: path.read_text().count("\n") == 1, "the first is written")
        with disk_full_after(path.stat().st_size + 20):
            logger.info("half of it is written")
            wait_until(lambda: lost(log) == 1, "the disk is full")
            logger.info("nothing of it is written")
            wait_until(lambda: lost(log) == 2, "the disk is full")
        logger.info("after")
        assert log.stop()
    first, half, last = path.read_text().splitlines()
    assert json.loads(first)["message"] == "before"
    assert len(half) == 20
    assert json.loads(last)["message"] == "after"
    assert json.loads(last)["lost_before"] == 2


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file grows beyond that meanwhile, as if there were no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_log_that_cannot_be_written_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with running(Broken()):
        logger.error("event")
    assert capsys.readouterr() == ("", "")


def test_events_of_many_threads_are_lines_of_their_own() -> None:
    stream = io.StringIO()

    def log_many(sender: str) -> None:
        for _ in range(200):
            logger.debug("event", extra={"sender": sender})

    with running(stream, form="json"), ExitStack() as stack:
        for sender in "abcd":
            stack.enter_context(in_background(partial(log_many, sender)))
    names = [json.loads(line)["sender"] for line in stream.getvalue().splitlines()]
    assert sorted(names) == sorted("abcd" * 200)


def test_nothing_is_passed_on_to_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    with running(io.StringIO()):
        logger.error("event")
    assert caplog.records == []
