"""What the tests of both packages share: the release they are built from, and a Debian 12 to try them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.box import Box, debian

ROOT = Path(__file__).parents[2]
NEEDED = {
    "dpkg-buildpackage": "dpkg-dev",
    "dh": "debhelper",
    "dh_python3": "dh-python",
    "lintian": "lintian",
    "mmdebstrap": "mmdebstrap",
    "rpmbuild": "rpm",
    "rpmlint": "rpmlint",
    "unshare": "util-linux",
}


def missing() -> str:
    """Says what keeps these tests from running here; nothing if nothing does."""
    if os.geteuid() != 0:
        return "not root"
    packages = [package for tool, package in NEEDED.items() if not shutil.which(tool)]
    return f"not installed: {', '.join(packages)}" if packages else ""


def build(*command: str) -> str:
    """Runs a step of the build; returns what it printed, stderr with stdout."""
    result = subprocess.run(command, cwd=ROOT, check=False, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="session")
def release() -> None:
    """What packages are built from is in build/package."""
    if lacking := missing():
        # Where everything is to be tried, nothing is left out in silence.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lacking)
    build("packaging/release", sys.executable)


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is the Debian's /srv."""
    directory = tmp_path_factory.mktemp("packages")
    directory.chmod(0o755)  # apt reads what it installs as a user of its own
    return directory


@pytest.fixture(scope="session")
def system(release: None, share: Path) -> Iterator[Box]:
    """A Debian 12 that has systemd and little else, and that knows what Debian's archive has today."""
    debian()
    with Box(share) as box:
        box.apt("update")
        yield box
