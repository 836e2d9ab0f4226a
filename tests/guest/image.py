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
QEMU = {"qemu-system-x86_64": "qemu-system-x86"}


def require(tools: dict[str, str]) -> None:
    """Leave a test out where programs are missing, and say why; with `CI` set it fails."""
    if lacking := [package for tool, package in tools.items() if not shutil.which(tool)]:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(lacking)}")


@pytest.fixture(scope="session")
def guest() -> Path:
    """A directory with the kernel, the initramfs, and what else `make guest` makes."""
    require(NEEDED)
    make()
    return BUILT


@pytest.fixture(scope="session")
def qemu() -> None:
    """There is a hypervisor."""
    require(QEMU)


@pytest.fixture(scope="session")
def vm_settings(qemu: None, guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings for VMs that run on any machine, however slow it is."""
    file = tmp_path_factory.mktemp("guest") / "guest.toml"
    file.write_text(
        f'kernel = "{guest}/vmlinuz"\nimage = "{guest}/initramfs"\naccelerator = "tcg"\nboot_timeout = 150\n'
    )
    return file


@pytest.fixture
def use_guest(vm_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have cc-proxyctl, here and in processes that are started, use these settings."""
    monkeypatch.setenv("CC_PROXY_GUEST", str(vm_settings))


def make() -> None:
    """Make what `make guest` makes."""
    build = ROOT / "packaging" / "guest" / "build"
    result = subprocess.run([build, sys.executable], check=False, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert result.returncode == 0, result.stdout
