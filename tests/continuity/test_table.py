"""The table: whenever its process is killed, the next one finds what makes sense."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from cc_proxy.continuity import table as module
from cc_proxy.continuity.table import MOST_IN_RECORD, MOST_SLOTS, SIZE, Table, Unreadable

DAEMON = b"daemon"


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, SIZE)


def found(memory: mmap.mmap) -> dict[bytes, int]:
    """What the next process finds: records, and the first word of each one's cell."""
    table = Table(memory)
    return {} if table.is_empty else {entry.record: entry.cell[0] for entry in table.entries()}


def begun(memory: mmap.mmap, *records: bytes) -> Table:
    """A table of a process that has taken over, with these records."""
    table = Table(memory)
    table.begin()
    for record in records:
        table.add(record)
    table.take_over(DAEMON)
    return table


def test_a_new_one_is_empty(memory: mmap.mmap) -> None:
    assert Table(memory).is_empty


def test_what_is_added_is_found_until_it_is_removed(memory: mmap.mmap) -> None:
    table = begun(memory, b"before")
    number, cell = table.add(b"after", [7])
    assert found(memory) == {b"before": 0, b"after": 7}
    cell[0] = 2**64 - 1
    assert found(memory) == {b"before": 0, b"after": 2**64 - 1}
    table.remove(number)
    assert found(memory) == {b"before": 0}
    assert Table(memory).daemon == DAEMON


def test_a_slot_that_is_used_again_has_another_number_and_begins_anew(memory: mmap.mmap) -> None:
    table = begun(memory)
    first, cell = table.add(b"a longer one", [1, 2, 3])
    cell[31] = 9
    table.remove(first)
    second, cell = table.add(b"short")
    assert second != first
    assert not any(cell)
    assert [(entry.number, entry.record) for entry in Table(memory).entries()] == [(second, b"short")]


def test_nothing_of_a_new_process_counts_before_it_takes_over(memory: mmap.mmap) -> None:
    begun(memory, b"first")
    for _ in range(3):
        killed = Table(memory)
        killed.begin()
        killed.add(b"never")
        assert found(memory) == {b"first": 0}
    table = begun(memory, b"second")
    assert found(memory) == {b"second": 0}
    for _ in range(10):
        table.remove(table.add(b"third")[0])
    assert found(memory) == {b"second": 0}


def test_slots_are_used_again_by_the_next_process(memory: mmap.mmap) -> None:
    records = [b"%d" % number for number in range(10_000)]
    for _ in range(20):
        begun(memory, *records)
    assert found(memory) == dict.fromkeys(records, 0)


def test_the_daemons_record_is_always_whole(memory: mmap.mmap) -> None:
    table = begun(memory)
    for size in (0, 1, 100_000, 5):
        table.set_daemon(bytes(size))
        assert Table(memory).daemon == bytes(size)
    with pytest.raises(ValueError, match="record"):
        table.set_daemon(bytes(1_000_000))
    assert Table(memory).daemon == bytes(5)


def test_what_is_handed_over_or_ended(memory: mmap.mmap) -> None:
    table = begun(memory, b"kept")
    table.hand_over()
    assert Table(memory).is_handed_over
    begun(memory, b"next").end()
    assert Table(memory).is_empty
    assert found(memory) == {}


def test_what_has_no_room(memory: mmap.mmap) -> None:
    table = begun(memory)
    table.add(bytes(MOST_IN_RECORD))
    with pytest.raises(ValueError, match="the most is"):
        table.add(bytes(MOST_IN_RECORD + 1))
    for _ in range(MOST_SLOTS - 1):
        table.add(b"")
    with pytest.raises(ValueError, match="parts"):
        table.add(b"")


def test_one_of_another_version_is_not_touched(memory: mmap.mmap) -> None:
    memory[:8] = b"ccproxy\x09"
    with pytest.raises(Unreadable, match="version"):
        Table(memory)
    assert memory[8:100] == bytes(92)


class Killed(BaseException):
    """The process is no more."""


class Mortal:
    """A struct that kills its process when so many stores have been made."""

    def __init__(self, inner: struct.Struct, left: list[int]) -> None:
        self._inner, self._left = inner, left
        self.size, self.unpack_from = inner.size, inner.unpack_from

    def pack_into(self, *arguments: Any) -> None:
        if not self._left[0]:
            raise Killed
        self._left[0] -= 1
        self._inner.pack_into(*arguments)


STEPS: dict[str, Callable[[Table, int], object]] = {
    "add": lambda table, _: table.add(b"added", [5]),
    "remove": lambda table, number: table.remove(number),
    "daemon": lambda table, _: table.set_daemon(b"other"),
    "hand over": lambda table, _: table.hand_over(),
    "end": lambda table, _: table.end(),
    "next process": lambda table, _: begun(table.memory, b"next"),
}


@pytest.mark.parametrize("step", STEPS)
def test_killed_between_any_two_stores(memory: mmap.mmap, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is what was there before, or what is there after."""
    outcomes = set()
    for stores in range(8):
        memory[:SIZE] = bytes(SIZE)
        table = begun(memory, b"first")
        number, _ = table.add(b"second")
        with monkeypatch.context() as patch, suppress(Killed):
            left = [stores]
            for name in ("_WORD", "_GENERATION", "_SLOT"):
                patch.setattr(module, name, Mortal(getattr(module, name), left))
            STEPS[step](table, number)
        after = Table(memory)
        daemon = b"" if after.is_empty else after.daemon
        outcomes.add((tuple(sorted(found(memory).items())), daemon, after.is_handed_over))
    assert len(outcomes) == 2
