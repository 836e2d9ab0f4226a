"""Fixtures of the tests under a real systemd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.box import Box, what_is_missing
from tests.systemd.service import SERVICE, SOCKET, Service

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here, so that it runs once and not on each Python there is."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.systemd)


@pytest.fixture(scope="session")
def box() -> Iterator[Box]:
    """One for the whole run."""
    if missing := what_is_missing():
        # Where everything is to be tried, nothing is left out in silence.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no systemd to test with: {missing}")
    with Box.boot() as box:
        Service.install(box)
        yield box


@pytest.fixture
def service(box: Box) -> Iterator[Service]:
    """The units as they are shipped, stopped; whatever a test does to them is undone."""
    service = Service(box)
    yield service
    service.reset()


@pytest.fixture
def activated(service: Service) -> Service:
    """The socket listens, the daemon does not run yet."""
    service.start(SOCKET)
    return service


@pytest.fixture
def daemon(activated: Service) -> Service:
    """The socket listens and the daemon runs."""
    activated.start(SERVICE)
    return activated
