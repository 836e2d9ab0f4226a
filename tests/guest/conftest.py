"""What tests with a real VM share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ctl.conftest import window
from tests.guest.stage import TABLES, Stage, vm
from tests.wire.daemon import Daemon

__all__ = ["environment", "stage", "web", "window"]


@pytest.fixture(scope="module")
def environment(vm_settings: Path) -> Iterator[Path]:
    """Where the directories of VMs are made; nothing is left there."""
    with (
        tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as path,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("CC_PROXY_GUEST", str(vm_settings))
        patch.setenv("TMPDIR", path)
        yield Path(path)
        assert list(Path(path).iterdir()) == []


@pytest.fixture(scope="module")
def stage(environment: Path) -> Iterator[Stage]:
    """A daemon that has nothing to complain about in the end."""
    with (
        tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as path,
        Daemon.configured(Path(path), TABLES) as daemon,
    ):
        yield Stage(daemon)
        daemon.check()


@pytest.fixture(scope="module")
def web(stage: Stage) -> Iterator[str]:
    """A VM that several tests use, one after the other."""
    with vm(stage, "web") as name:
        yield name
