"""The Debian package: built, read by lintian, and in a Debian 12 with a systemd, from install to purge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.box import Box, debian

ROOT = Path(__file__).parent.parent.parent
NEEDED = ["dpkg-buildpackage", "dh", "dh_python3", "lintian", "mmdebstrap", "unshare", "nsenter"]
SETTINGS = "/etc/cc-proxy/cc-proxy.toml"

pytestmark = [pytest.mark.package, pytest.mark.timeout(300)]


def missing() -> str:
    """Says what keeps these tests from running here; nothing if nothing does."""
    if os.geteuid() != 0:
        return "not root"
    tools = [tool for tool in NEEDED if not shutil.which(tool)]
    return f"not installed: {', '.join(tools)}" if tools else ""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package, as cc-proxy.deb, and a newer one that has other default settings."""
    if lacking := missing():
        # Where everything is to be tried, nothing is left out in silence.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lacking)
    for command in (["packaging/release", sys.executable], ["packaging/deb"]):
        result = subprocess.run(command, cwd=ROOT, check=False, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert result.returncode == 0, result.stdout
    (built,) = (ROOT / "build" / "deb").glob("cc-proxy_*.deb")
    directory = tmp_path_factory.mktemp("packages")
    shutil.copy(built, directory / "cc-proxy.deb")
    make_newer(built, directory)
    return directory


def make_newer(built: Path, directory: Path) -> None:
    tree = directory / "newer"
    subprocess.run(["dpkg-deb", "-R", built, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 1:"))
    with (tree / SETTINGS[1:]).open("a") as settings:
        settings.write("\n# newer\n")
    subprocess.run(["dpkg-deb", "-b", tree, directory / "newer.deb"], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def box(packages: Path) -> Iterator[Box]:
    debian()
    with Box(packages) as box:
        box.run("dpkg", "-i", "/srv/cc-proxy.deb")
        yield box


def active(box: Box, *units: str) -> list[str]:
    return box.run("systemctl", "is-active", *units, check=False).stdout.split()


def main_pid(box: Box) -> str:
    return box.run("systemctl", "show", "--property=MainPID", "--value", "cc-proxy.service").stdout.strip()


def test_installed_it_runs(box: Box) -> None:
    assert active(box, "cc-proxy.socket", "cc-proxy.service") == ["active", "active"]
    assert box.run("stat", "-c", "%U:%G %a", "/run/cc-oci-runtime/proxy.sock").stdout == "root:cc-proxy 660\n"
    assert box.run("stat", "-c", "%U:%G %a", "/etc/cc-proxy").stdout == "root:root 755\n"
    assert (
        box.run("cc-proxyctl", "run", "--local", "--", "echo", "through the daemon").stdout
        == "through the daemon\n"
    )
    box.run("journalctl", "--sync")
    assert "VM registered" in box.run("journalctl", "-t", "cc-proxy", "-o", "cat").stdout
    assert "cc-proxy.toml(5)" in box.run("env", "MANPAGER=cat", "man", "8", "cc-proxy").stdout
    program = "import sys; sys.path.append('/usr/lib/cc-proxy'); import cc_proxy.api, msgspec; print(msgspec)"
    assert "'/usr/lib/cc-proxy/msgspec/" in box.run("python3", "-c", program).stdout
    assert box.run("python3", "-c", "import msgspec", check=False).returncode == 1  # nobody else sees it


def test_socket_starts_it(box: Box) -> None:
    box.run("systemctl", "stop", "cc-proxy.service")
    assert box.run("cc-proxyctl", "run", "--local", "--", "echo", "awake").stdout == "awake\n"
    assert active(box, "cc-proxy.service") == ["active"]


def test_upgrade_keeps_changed_settings_and_restarts(box: Box) -> None:
    before = main_pid(box)
    box.run("sed", "-i", "s/^#vms = .*/vms = 7/", SETTINGS)
    box.run("dpkg", "--force-confdef", "--force-confold", "-i", "/srv/newer.deb")
    assert "vms = 7" in box.run("cat", SETTINGS).stdout
    assert "# newer" in box.run("cat", f"{SETTINGS}.dpkg-dist").stdout
    assert active(box, "cc-proxy.socket", "cc-proxy.service") == ["active", "active"]
    assert main_pid(box) != before
    assert box.run("cc-proxyctl", "run", "--local", "--", "echo", "again").stdout == "again\n"


def test_upgrade_takes_new_settings_where_the_old_were_untouched(box: Box) -> None:
    box.run("dpkg", "-i", "/srv/newer.deb")
    assert "# newer" in box.run("cat", SETTINGS).stdout


def test_removed_and_purged(box: Box) -> None:
    box.run("dpkg", "-r", "cc-proxy")
    assert "active" not in active(box, "cc-proxy.socket", "cc-proxy.service")
    assert box.run("test", "-e", "/usr/lib/cc-proxy", check=False).returncode == 1
    box.run("test", "-e", SETTINGS)
    box.run("dpkg", "-P", "cc-proxy")
    left = [
        "/etc/cc-proxy",
        "/run/cc-oci-runtime/proxy.sock",
        "/var/lib/systemd/deb-systemd-helper-enabled/cc-proxy.socket.dsh-also",
    ]
    assert [path for path in left if box.run("test", "-e", path, check=False).returncode == 0] == []
    assert "cc-proxy" not in box.run("systemctl", "list-unit-files").stdout
