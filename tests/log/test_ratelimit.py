"""How often an event is logged."""

from __future__ import annotations

import io
import json
import logging

import pytest

from cc_proxy.log import ratelimit
from cc_proxy.log import writing as log_module
from cc_proxy.log.levels import logger
from cc_proxy.log.ratelimit import BURST, PER_SECOND, RateLimit
from cc_proxy.log.writing import Logging
from tests.clock import Clock

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.rule(monkeypatch, ratelimit, log_module)
    return clock


def passed(limit: RateLimit, times: int, text: str = "event", level: int = logging.WARNING) -> int:
    record = logging.LogRecord("cc_proxy", level, __file__, 1, text, None, None)
    return sum(bool(limit.filter(record)) for _ in range(times))


def test_a_burst_then_some_in_each_second(clock: Clock) -> None:
    limit = RateLimit()
    assert passed(limit, BURST + 50) == BURST
    clock.now += 3
    assert passed(limit, 50) == 3 * PER_SECOND
    clock.now += 1_000_000
    assert passed(limit, BURST * 2) == BURST, "no more is saved up"


def test_kinds_do_not_count_against_each_other(clock: Clock) -> None:
    limit = RateLimit()
    assert passed(limit, 2 * BURST, "flood") == BURST
    assert passed(limit, 1, "rare") == 1
    assert passed(limit, 1, "flood", logging.ERROR) == 1


def test_debug_is_not_limited(clock: Clock) -> None:
    assert passed(RateLimit(), 10 * BURST, level=logging.DEBUG) == 10 * BURST


def test_what_was_suppressed_is_counted_once(clock: Clock) -> None:
    limit = RateLimit()
    passed(limit, BURST + 7)
    passed(limit, BURST + 1, "other")
    assert limit.take_suppressed() == {(logging.WARNING, "event"): 7, (logging.WARNING, "other"): 1}
    assert limit.take_suppressed() == {}


def test_the_log_says_later_how_many_it_left_out(clock: Clock) -> None:
    stream = io.StringIO()
    log = Logging("info", "json", stream)
    log.start()
    for number in range(BURST + 5):
        logger.warning("flood", extra={"number": number})
    log.report_suppressed()  # too early
    clock.now += 60
    log.report_suppressed()
    log.report_suppressed()
    for _ in range(BURST + 1):
        logger.warning("flood")
    log.stop()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    said = [(event["level"], event["message"], event.get("event"), event.get("count")) for event in events]
    flood = [("WARNING", "flood", None, None)] * BURST
    report = ("WARNING", "log lines suppressed", "flood")
    assert said == [*flood, (*report, 5), *flood, (*report, 1)], "and at the end, what is left"
