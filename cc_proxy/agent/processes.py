"""The processes of a pod, by the streams they own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cc_proxy.agent.process import Process


class Processes:
    """The processes that run. Several may have the same seq, if a host asks for that.

    Then their output is mixed, and what the host sends goes to the oldest of them.
    """

    def __init__(self) -> None:
        self._by_seq: dict[int, list[Process]] = {}

    def add(self, process: Process) -> None:
        """Add a process that has been started."""
        self._by_seq.setdefault(process.seq, []).append(process)

    def remove(self, process: Process) -> None:
        """Remove a process that has gone."""
        same = self._by_seq[process.seq]
        same.remove(process)
        if not same:
            del self._by_seq[process.seq]

    def owner(self, seq: int) -> Process | None:
        """Return the process that gets what the host sends on a seq; None if there is none."""
        same = self._by_seq.get(seq)
        return same[0] if same else None

    def __iter__(self) -> Iterator[Process]:
        return (process for same in self._by_seq.values() for process in same)

    def __bool__(self) -> bool:
        return bool(self._by_seq)
