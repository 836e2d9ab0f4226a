"""The RPM: built, read by rpmlint, and installed by rpm, scriptlets too, in a Debian 12 that has a systemd.

It is not made for Debian: this shows what it installs and does, and not whether what it needs can be had.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.box import Box
from tests.packaging.conftest import ROOT, build
from tests.packaging.contents import FILES, UNITS, found, runs_a_process

SETTINGS = "/etc/cc-proxy/cc-proxy.toml"
MORE_FILES = {
    "/usr/share/licenses/cc-proxy-1.0.0/LICENSE.msgspec": "root:root 644",
    "/usr/share/licenses/cc-proxy-1.0.0/LICENSE.selectors2": "root:root 644",
    "/usr/share/man/man1/cc-proxyctl.1": "root:root 644",
    "/usr/share/man/man5/cc-proxy-guest.toml.5": "root:root 644",
    "/usr/share/man/man5/cc-proxy.toml.5": "root:root 644",
    "/usr/share/man/man8/cc-proxy.8": "root:root 644",
    "/usr/share/zsh/site-functions/_cc-proxy": "root:root 644",
    "/usr/share/zsh/site-functions/_cc-proxyctl": "root:root 644",
}

# The first test waits for the build and for the archive.
pytestmark = [pytest.mark.package, pytest.mark.timeout(900)]


class Rpm:
    """The package, and rpm, which is this machine's; `database` is a directory for what it knows."""

    def __init__(self, path: Path, box: Box, database: Path) -> None:
        self.path = path
        self.box = box
        # SQLite takes /proc/PID/root for a link to this machine's root, so there has to be one here too.
        self._database = database

    def run(self, *arguments: str | Path) -> str:
        """Has rpm do something in the box; returns what it said."""
        command = ["rpm", "--root", self.box.root, "--dbpath", self._database, *arguments]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert result.returncode == 0, result.stdout
        return result.stdout


@pytest.fixture(scope="module")
def built(release: None) -> Path:
    """The package, after rpmlint had nothing to say about it."""
    said = build("packaging/rpm/build")
    assert " 0 errors, 0 warnings," in said
    (path,) = (ROOT / "build" / "rpm" / "RPMS").glob("*/cc-proxy-[0-9]*.rpm")
    return path


@pytest.fixture
def rpm(system: Box, built: Path, tmp_path: Path) -> Iterator[Rpm]:
    """The package is installed; erased in the end."""
    system.apt("install", "python3-pythonjsonlogger")
    rpm = Rpm(built, system, tmp_path)
    rpm.run("--install", "--nodeps", built)
    system.run("systemctl", "daemon-reload")
    yield rpm
    if rpm.run("--query", "--all"):
        rpm.run("--erase", "--nodeps", "cc-proxy")
    system.run("systemctl", "daemon-reload")


def test_everything_is_in_its_place(rpm: Rpm) -> None:
    assert found(rpm.box, FILES | MORE_FILES) == FILES | MORE_FILES
    assert rpm.run("--verify", "--nodeps", "cc-proxy") == ""


def test_its_scriptlets_made_user_and_group(rpm: Rpm) -> None:
    user = rpm.box.output("getent", "passwd", "cc-proxy").split(":")
    group = rpm.box.output("getent", "group", "cc-proxy").split(":")
    assert user[3] == group[2]
    assert user[4:] == ["cc-proxy daemon", "/", "/usr/sbin/nologin"]


def test_what_is_installed_runs(rpm: Rpm) -> None:
    assert rpm.box.output("cc-proxy", "--version") == "cc-proxy 1.0.0"
    assert rpm.box.output("cc-proxy", "--check-config") == (
        "cc-proxy: /etc/cc-proxy/cc-proxy.toml: the settings are right"
    )
    rpm.box.run("systemctl", "start", UNITS[0])
    assert runs_a_process(rpm.box)
    assert rpm.box.active(*UNITS) == ["active", "active"]
    rpm.box.run("systemctl", "stop", *UNITS)


def test_changed_settings_are_kept(rpm: Rpm) -> None:
    rpm.box.run("sed", "-i", "s/^#vms = .*/vms = 7/", SETTINGS)
    rpm.run("--reinstall", "--nodeps", rpm.path)
    assert "vms = 7" in rpm.box.output("cat", SETTINGS)
    rpm.run("--erase", "--nodeps", "cc-proxy")
    assert "vms = 7" in rpm.box.output("cat", f"{SETTINGS}.rpmsave")
    rpm.box.run("rm", "-r", "/etc/cc-proxy")


def test_erased_it_leaves_nothing(rpm: Rpm) -> None:
    rpm.run("--erase", "--nodeps", "cc-proxy")
    assert found(rpm.box, FILES | MORE_FILES).keys() <= {"/run/cc-oci-runtime"}


def test_the_policy_is_a_package_of_its_own(built: Path, tmp_path: Path) -> None:
    (policy,) = built.parents[1].glob("noarch/cc-proxy-selinux-*.rpm")
    list_files: list[str | Path] = ["rpm", "--dbpath", tmp_path, "-qlp", policy]
    files = subprocess.run(list_files, check=True, capture_output=True, text=True).stdout.split()
    assert "/usr/share/selinux/packages/cc_proxy.pp" in files
