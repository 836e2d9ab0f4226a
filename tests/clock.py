"""A clock that goes when it is told to."""

from __future__ import annotations

from types import ModuleType

import pytest


class Clock:
    """Stands in for the module `time`: time passes only while somebody sleeps, or is set."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def rule(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """Be the time of these modules, for tests of hours, or of what happens at one exact moment."""
        for module in modules:
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
