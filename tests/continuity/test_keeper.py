"""What is kept, when there is nearly too much of it."""

from __future__ import annotations

import itertools
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeVar

import pytest

from cc_proxy.api.status import Replaced
from cc_proxy.continuity.box import Box, close_all
from cc_proxy.continuity.format import DaemonRecord
from cc_proxy.continuity.keeper import Slot, TableKeeper
from cc_proxy.continuity.state.clients import ConnectionRecord, ListenerState
from cc_proxy.continuity.table import SIZE, Table
from cc_proxy.linux.credentials import Credentials
from cc_proxy.linux.fds import Fd
from tests.users import call_as, count_as_oneself, needs_root

T = TypeVar("T")

#: As many fds may be in flight. What was taken out may count for a moment longer, so these many surely may.
LIMIT = 400
MANY = 320

_uids = itertools.count(100_000 + 10 * os.getpid())


@pytest.fixture
def fds() -> Iterator[list[int]]:
    made = [os.memfd_create(str(number)) for number in range(600)]
    yield made
    close_all(made)


def limited(function: Callable[[], T]) -> T:
    """Call it as a user who has nothing in flight yet, where no more fds may be."""

    def call() -> T:
        count_as_oneself()
        return function()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard))
    try:
        return call_as(Credentials(0, next(_uids), 54_321, ()), call)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def new_keeper(box: Box, memory: mmap.mmap, listener: int) -> TableKeeper:
    keeper = TableKeeper(Table(memory), box)
    keeper.take_over(daemon(listener))
    return keeper


def daemon(listener: int) -> DaemonRecord:
    return DaemonRecord(
        program="",
        settings=b"",
        log_level=None,
        known_since=0.0,
        replaced=Replaced(),
        gaps=(0, 0),
        listener=ListenerState(Fd(listener), None, for_all=True),
    )


def keep(keeper: TableKeeper, fds: list[int]) -> list[Slot]:
    """Keep each; returns those that are kept."""
    slots = [keeper.keep(ConnectionRecord(fd=Fd(fd), number=fd)) for fd in fds]
    return [slot for slot in slots if slot.number]


def inodes(fds: list[int]) -> set[int]:
    return {os.fstat(fd).st_ino for fd in fds}


def held(box: Box) -> set[int]:
    _, fds = box.look()
    try:
        return inodes(fds)
    finally:
        close_all(fds)


@needs_root
def test_all_are_kept_that_may_be_in_flight(fds: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Packing them does not double them. What is too much is said once, and costs nothing that is kept."""
    memory = mmap.mmap(-1, SIZE)
    with closing(Box()) as box:
        keeper = new_keeper(box, memory, fds[0])
        slots = limited(lambda: keep(keeper, fds[1:]))
        assert len(slots) >= MANY
        assert inodes(fds[: len(slots) + 1]) == held(box)
        [said] = [record for record in caplog.records if "will not outlive a crash" in record.message]
        assert "raise LimitNOFILE=" in str(vars(said)["error"])


@needs_root
def test_there_is_room_again_for_what_comes_when_others_have_gone(fds: list[int]) -> None:
    memory = mmap.mmap(-1, SIZE)
    with closing(Box()) as box:
        keeper = new_keeper(box, memory, fds[0])

        def have_others() -> int:
            slots = keep(keeper, fds[1:MANY])
            for slot in slots[100:]:
                slot.release()
            return len(keep(keeper, fds[MANY : MANY + 200]))

        assert limited(have_others) == 200
        assert inodes(fds[:100] + fds[MANY : MANY + 200]) <= held(box)


@needs_root
def test_the_next_process_keeps_as_many(fds: list[int]) -> None:
    memory = mmap.mmap(-1, SIZE)
    with closing(Box()) as box:
        before = new_keeper(box, memory, fds[0])
        limited(lambda: keep(before, fds[1:MANY]))
        copies = [end.dup() for end in box.ends]
    with closing(Box(copies)) as box:
        assert held(box) == inodes(fds[:MANY])
        keeper = TableKeeper(Table(memory), box)

        def go_on() -> int:
            slots = keep(keeper, fds[1:MANY])
            keeper.take_over(daemon(fds[0]))
            return len(slots)

        assert limited(go_on) == MANY - 1
        assert held(box) == inodes(fds[:MANY])
        assert box.messages == 2
