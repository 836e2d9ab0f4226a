"""The connector of the process that runs the tests, for those that connect to VMs in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing

import pytest

from cc_proxy.proxy.vms.connector import Connector

CONNECTOR = Connector()


@pytest.fixture(scope="session", autouse=True)
def connector() -> Iterator[Connector]:
    """Runs from the start, so that no test leaks it."""
    with closing(CONNECTOR), warnings.catch_warnings():
        # From Python 3.12 on: pytest-xdist has threads, which the connector does not care about.
        warnings.simplefilter("ignore", DeprecationWarning)
        CONNECTOR.start()
        yield CONNECTOR
