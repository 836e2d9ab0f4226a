"""The order in which the agent serves what is ready."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from cc_proxy.agent.loop import READ, Loop, Turn


@pytest.fixture
def loop() -> Iterator[Loop]:
    with closing(Loop()) as loop:
        yield loop


class Ready:
    """Something that is ready until it has been served so often."""

    def __init__(self, loop: Loop, turn: Turn, served: list[Turn], times: int = 1) -> None:
        self._loop, self._turn, self._served, self._times = loop, turn, served, times
        self._fd, writer = os.pipe()
        os.close(writer)
        loop.watch(self._fd, READ, self._serve, turn)

    def _serve(self, _events: int) -> None:
        self._served.append(self._turn)
        self._times -= 1
        if not self._times:
            self._loop.forget(self._fd)
            os.close(self._fd)


def test_each_round_serves_what_is_ready_in_the_order_of_the_turns(loop: Loop) -> None:
    served: list[Turn] = []
    for turn, times in ((Turn.PROCESSES, 3), (Turn.FRAMES, 2), (Turn.COMMANDS, 2)):
        Ready(loop, turn, served, times)
    loop.call_later(0.05, loop.stop)
    loop.run()
    one = [Turn.COMMANDS, Turn.FRAMES, Turn.PROCESSES]
    assert served == one + one + [Turn.PROCESSES]


def test_the_last_are_served_when_nothing_else_is_ready(loop: Loop) -> None:
    served: list[Turn] = []
    for turn, times in ((Turn.LAST, 1), (Turn.LAST, 1), (Turn.FRAMES, 3)):
        Ready(loop, turn, served, times)
    loop.call_later(0.05, loop.stop)
    loop.run()
    assert served == [Turn.FRAMES] * 3 + [Turn.LAST] * 2
