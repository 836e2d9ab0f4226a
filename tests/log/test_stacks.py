"""What SIGUSR1 logs."""

from __future__ import annotations

import logging
import threading

from cc_proxy.log.levels import fields_of, logger
from cc_proxy.log.stacks import log_stacks
from tests.proxy.conftest import Logged, logged
from tests.wire.support import WAIT

__all__ = ["logged"]


class Crowd:
    """Threads that wait in the same place; or in places of their own, each some calls deeper than another."""

    def __init__(self, count: int, *, apart: bool = False) -> None:
        self._go = threading.Event()
        here = threading.Barrier(count + 1)

        def wait() -> None:
            here.wait(WAIT)
            self._go.wait(WAIT)

        def go_deeper(calls: int) -> None:
            if calls:
                go_deeper(calls - 1)
            else:
                wait()

        self._threads = [
            threading.Thread(target=go_deeper, args=[number * apart], name=f"crowd {number}")
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        here.wait(WAIT)

    def close(self) -> None:
        self._go.set()
        for thread in self._threads:
            thread.join()


def test_thousands_of_threads_in_one_place_are_one_line(logged: Logged) -> None:
    crowd = Crowd(300)
    try:
        # Some may still be on their way out of the barrier.
        log_stacks()
    finally:
        crowd.close()
    found = logged.fields("stack")
    biggest = found[0]
    assert biggest["count"] == max(stack["count"] for stack in found)  # type: ignore[type-var]
    assert sum(int(str(stack["count"])) for stack in found) >= 301
    assert len(found) < 30
    assert len(list(biggest["threads"])) == 8  # type: ignore[call-overload]
    assert "self._go.wait(WAIT)" in str(biggest["stack"]) or "here.wait(WAIT)" in str(biggest["stack"])
    assert any(stack["threads"] == ["MainThread"] for stack in found)


def test_no_more_stacks_than_can_be_read(logged: Logged) -> None:
    crowd = Crowd(70, apart=True)
    try:
        log_stacks()
    finally:
        crowd.close()
    assert len(logged.fields("stack")) == 64
    (left,) = logged.fields("stacks left out")
    assert int(str(left["count"])) >= 7, "there is the main thread too"


def test_they_are_logged_whatever_the_level(logged: Logged) -> None:
    logger.setLevel(logging.CRITICAL)
    log_stacks()
    assert logged.records
    assert all(record.levelno == logging.INFO for record in logged.records)
    assert all(fields_of(record) for record in logged.records)
