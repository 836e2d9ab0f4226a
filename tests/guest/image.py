"""The guest that the tests use: made once, of packages that were fetched once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "guest"
#: What makes it, and the package that has that.
NEEDED = {"apt-get": "apt", "dpkg-deb": "dpkg"}


def require(tools: dict[str, str]) -> None:
    """Leave a test out where programs are missing, and say why; with `CI` set it fails."""
    if lacking := [package for tool, package in tools.items() if not shutil.which(tool)]:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(lacking)}")


def make() -> None:
    """Make what `make guest` makes."""
    build = ROOT / "packaging" / "guest" / "build"
    result = subprocess.run([build, sys.executable], check=False, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert result.returncode == 0, result.stdout
