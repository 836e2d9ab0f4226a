"""The daemons that these tests share: starting one takes longer than most tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.wire.daemon import BRIEF, HASTY, PATIENT, UNPACED, Daemon, Wire


class Pool:
    """Daemons by name. One that a test broke is replaced before the next test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._daemons: dict[str, Daemon] = {}
        self._broken: dict[str, str] = {}
        self._count = 0

    def start(self, name: str, tables: str) -> None:
        self._count += 1
        directory = self._directory / str(self._count)
        directory.mkdir()
        self._daemons[name] = Daemon.configured(directory, tables)

    def get(self, name: str) -> Daemon:
        return self._daemons[name]

    def give_up(self, name: str, tables: str) -> None:
        self._broken[name] = tables

    def revive(self) -> None:
        while self._broken:
            name, tables = self._broken.popitem()
            self._daemons.pop(name).kill()
            self.start(name, tables)

    def stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        with daemon:
            assert daemon.stop() == 0
            assert not daemon.socket_path.exists()
            daemon.check_log()


_POOL = pytest.StashKey[Pool]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the leak fixture looks: a daemon is no child of a test."""
    if _POOL in item.config.stash:
        item.config.stash[_POOL].revive()


@pytest.fixture(scope="session")
def pool(pytestconfig: pytest.Config) -> Iterator[Pool]:
    with tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as path:
        pool = Pool(Path(path))
        pytestconfig.stash[_POOL] = pool
        yield pool
        del pytestconfig.stash[_POOL]


def _session_daemon(name: str, tables: str) -> Callable[[Pool], Iterator[None]]:
    def session_daemon(pool: Pool) -> Iterator[None]:
        pool.start(name, tables)
        yield
        pool.stop(name)

    return session_daemon


def _wire(name: str, tables: str, pool: Pool, directory: Path) -> Iterator[Wire]:
    wire = Wire(pool.get(name), directory)
    try:
        yield wire
    finally:
        wire.close()
    try:
        wire.daemon.check()
    except BaseException:
        pool.give_up(name, tables)
        raise


patient_daemon = pytest.fixture(scope="session")(_session_daemon("patient", PATIENT))
hasty_daemon = pytest.fixture(scope="session")(_session_daemon("hasty", HASTY))
brief_daemon = pytest.fixture(scope="session")(_session_daemon("brief", BRIEF))
unpaced_daemon = pytest.fixture(scope="session")(_session_daemon("unpaced", UNPACED))


@pytest.fixture
def wire(pool: Pool, patient_daemon: None, tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon that never runs out of patience, with stdin paced as by default."""
    yield from _wire("patient", PATIENT, pool, tmp_sock_dir)


@pytest.fixture
def hasty(pool: Pool, hasty_daemon: None, tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon whose times are all below a second."""
    yield from _wire("hasty", HASTY, pool, tmp_sock_dir)


@pytest.fixture
def brief(pool: Pool, brief_daemon: None, tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon that soon gives up a VM whose sockets are not there."""
    yield from _wire("brief", BRIEF, pool, tmp_sock_dir)


@pytest.fixture
def unpaced(pool: Pool, unpaced_daemon: None, tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon that does not pace stdin."""
    yield from _wire("unpaced", UNPACED, pool, tmp_sock_dir)
