"""What is fuzzed: a module for each target.

Its `run` takes the choices that an input is, and raises if the code does what it may not. Which exceptions
the code may raise is written at the top of each; any other is a finding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from tests.fuzz.choices import Choices

TARGETS = (
    "agent",
    "console",
    "control",
    "fds",
    "frames",
    "messages",
    "pacing",
    "requests",
    "settings",
    "status",
    "stdin",
)


def load(name: str) -> Callable[[Choices], None]:
    """The `run` of a target."""
    return cast("Callable[[Choices], None]", importlib.import_module(f"{__name__}.{name}").run)
