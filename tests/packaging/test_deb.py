"""The Debian package: built, read by lintian, and in a Debian 12 with a systemd, from install to purge."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cc_proxy.api import DEFAULT_SOCKET, Client, Refused
from cc_proxy.continuity.format import VERSION
from tests.asking import asking
from tests.packaging.box import Box
from tests.packaging.conftest import ROOT, build
from tests.packaging.contents import FILES, MAN_PAGES, UNITS, found, runs_a_process
from tests.wire.support import wait_until

SETTINGS = "/etc/cc-proxy/cc-proxy.toml"
COMPLETIONS = {
    f"/usr/share/zsh/vendor-completions/_{name}": "root:root 644" for name in ("cc-proxy", "cc-proxyctl")
}
GUEST = {f"/usr/lib/cc-proxy/guest/{name}": "root:root 644" for name in ("initramfs", "vmlinuz")}
NOT_IN_DEBIAN = ("msgspec", "selectors2.py")
FORMAT = f"\nVERSION = {VERSION}"
ARCHIVE = r"http://(deb|security)\.debian\.org/debian(-security)?$"

# The first test waits for the build and for the archive.
pytestmark = [pytest.mark.package, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def packages(release: None, share: Path) -> None:
    """In the system's /srv: both packages, and a newer one.

    That has other default settings, and leaves its state to the next process in a newer format.
    """
    build("packaging/deb")
    (built,) = (ROOT / "build" / "deb").glob("cc-proxy_*.deb")
    shutil.copy(built, share / "cc-proxy.deb")
    (guest,) = (ROOT / "build" / "deb").glob("cc-proxy-guest_*.deb")
    shutil.copy(guest, share / "cc-proxy-guest.deb")
    make_newer(built, share)


def make_newer(built: Path, directory: Path) -> None:
    tree = directory / "newer"
    subprocess.run(["dpkg-deb", "-R", built, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 1:"))
    with (tree / SETTINGS[1:]).open("a") as settings:
        settings.write("\n# newer\n")
    code = tree / "usr/lib/cc-proxy/cc_proxy/continuity/format.py"
    assert code.read_text().count(FORMAT) == 1
    code.write_text(code.read_text().replace(FORMAT, FORMAT + "00"))
    subprocess.run(["dpkg-deb", "-b", tree, directory / "newer.deb"], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def apt_said(system: Box, packages: None) -> str:
    """What apt said when it installed the package in a system that had nothing of what it needs."""
    assert not system.has("/usr/bin/python3"), "the system has what it should get"
    said = system.apt("install", "/srv/cc-proxy.deb")
    system.run("dpkg", "--purge", "cc-proxy")
    return said


@pytest.fixture
def box(system: Box, apt_said: str) -> Iterator[Box]:
    """The package is installed, in a system that has what it needs; purged in the end."""
    system.run("dpkg", "--install", "/srv/cc-proxy.deb")
    yield system
    system.run("dpkg", "--purge", "cc-proxy")


def main_pid(box: Box) -> str:
    return box.output("systemctl", "show", "--property=MainPID", "--value", "cc-proxy.service")


def test_what_the_system_lacks_comes_from_debians_archive_alone(apt_said: str) -> None:
    sources = set(re.findall(r"^Get:\d+ (\S+)", apt_said, re.MULTILINE)) - {"/srv/cc-proxy.deb"}
    assert "http://deb.debian.org/debian" in sources
    assert {source for source in sources if not re.match(ARCHIVE, source)} == set()


def test_what_debian_lacks_is_private(box: Box) -> None:
    private = set(box.output("ls", "/usr/lib/cc-proxy").split())
    assert private - {"__pycache__"} == {"cc_proxy", *NOT_IN_DEBIAN}
    elsewhere = box.run("python3", "-c", "import msgspec", check=False)
    assert "No module named 'msgspec'" in elsewhere.stdout
    program = "import sys; sys.path.append('/usr/lib/cc-proxy'); import cc_proxy.api, msgspec; print(msgspec)"
    assert "'/usr/lib/cc-proxy/msgspec/" in box.output("python3", "-c", program)


def test_everything_is_in_its_place(box: Box) -> None:
    assert found(box, FILES | COMPLETIONS) == FILES | COMPLETIONS
    for page, section in MAN_PAGES.items():
        assert f"{page.upper()}({section})" in box.output("env", "MANPAGER=cat", "man", section, page)
    assert box.output("dpkg", "--verify", "cc-proxy") == ""


def test_installed_it_runs(box: Box) -> None:
    assert box.active(*UNITS) == ["active", "active"]
    assert found(box, {"/run/cc-oci-runtime/proxy.sock": ""}).popitem()[1] == "root:cc-proxy 660"
    assert runs_a_process(box)
    assert "VM registered" in box.log("-t", "cc-proxy")
    assert box.output("ps", "-o", "user=", "-p", main_pid(box)) == "cc-proxy"


def test_the_guest_is_a_package_of_its_own(box: Box) -> None:
    assert found(box, GUEST) == {}
    box.run("dpkg", "--install", "/srv/cc-proxy-guest.deb")
    assert found(box, GUEST) == GUEST
    assert box.output("dpkg", "--verify", "cc-proxy-guest") == ""
    licences = box.output("ls", "/usr/share/doc/cc-proxy-guest/licences").split()
    bill = json.loads(box.output("cat", "/usr/share/doc/cc-proxy-guest/sbom.spdx.json"))
    assert {f"licences/{name}" for name in licences} == {each["licenseComments"] for each in bill["packages"]}
    box.run("dpkg", "--purge", "cc-proxy-guest")
    assert found(box, GUEST) == {}


def test_socket_starts_it(box: Box) -> None:
    box.run("systemctl", "stop", "cc-proxy.service")
    assert runs_a_process(box)
    assert box.active("cc-proxy.service") == ["active"]


def test_upgrade_keeps_changed_settings_and_restarts(box: Box) -> None:
    before = main_pid(box)
    box.run("sed", "-i", "s/^#vms = .*/vms = 7/", SETTINGS)
    box.run("dpkg", "--force-confdef", "--force-confold", "-i", "/srv/newer.deb")
    assert "vms = 7" in box.output("cat", SETTINGS)
    assert "# newer" in box.output("cat", f"{SETTINGS}.dpkg-dist")
    assert box.active(*UNITS) == ["active", "active"]
    assert main_pid(box) != before
    assert runs_a_process(box)


def test_upgrade_takes_new_settings_where_the_old_were_untouched(box: Box) -> None:
    box.run("dpkg", "-i", "/srv/newer.deb")
    assert "# newer" in box.output("cat", SETTINGS)


def test_upgrade_with_broken_settings_does_not_break_the_package(box: Box) -> None:
    box.run("sed", "-i", "1i nonsense = 1", SETTINGS)
    box.run("dpkg", "--force-confdef", "--force-confold", "-i", "/srv/newer.deb")
    assert box.active("cc-proxy.service") == ["active"], "the settings from before stay in force"
    assert runs_a_process(box)
    assert "install ok installed" in box.output("dpkg", "-s", "cc-proxy")
    box.run("sed", "-i", "1d", SETTINGS)
    assert runs_a_process(box)


# VMs and streams stay.


@contextmanager
def streaming(box: Box) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sends back what it gets, all the time; in the end all has come back."""
    cycle = random.Random(1).randbytes(1 << 16)
    over = threading.Event()
    sizes = {"sent": 0, "got": 0}

    def send() -> None:
        assert process.stdin
        with suppress(BrokenPipeError), process.stdin as stdin:  # closing it writes, too
            while not over.is_set():
                stdin.write(cycle)
                sizes["sent"] += len(cycle)

    def read() -> None:
        assert process.stdout
        while data := os.read(process.stdout.fileno(), len(cycle)):
            at = sizes["got"] % len(cycle)
            assert data == (cycle + cycle)[at : at + len(data)], f"after {sizes['got']} bytes"
            sizes["got"] += len(data)

    with box.running("cc-proxyctl", "run", "--local", "-i", "--id", "shim", "--", "cat") as process:
        with ThreadPoolExecutor(2) as pool:
            both = pool.submit(send), pool.submit(read)
            try:
                wait_until(lambda: sizes["got"] > 0 or process.poll() is not None, "it runs")
                yield process
            finally:
                over.set()
            for each in both:
                each.result()
        if not process.wait():
            assert sizes["got"] == sizes["sent"] > 0


def test_streams_go_on_through_an_upgrade(box: Box) -> None:
    before = main_pid(box)
    with streaming(box) as process:
        box.run("dpkg", "--install", "/srv/newer.deb")
        assert main_pid(box) != before
        assert "taken over from the previous process" in box.log("-t", "cc-proxy")
        box.run("dpkg", "--install", "/srv/newer.deb")
    assert process.returncode == 0


def test_a_downgrade_to_what_cannot_read_the_state_is_an_end_that_is_logged(box: Box) -> None:
    box.run("dpkg", "--install", "/srv/newer.deb")
    with streaming(box) as process:
        box.run("dpkg", "--install", "/srv/cc-proxy.deb")
        assert process.wait(30) == 125
        assert process.stderr
        assert "cc-proxy was restarted before 'cat' had ended" in process.stderr.read().decode()
    said = [json.loads(line) for line in box.log("-t", "cc-proxy", "-p", "err").splitlines()]
    assert said[-1]["message"] == "nothing is taken over: all VMs end"
    assert "in a newer format" in said[-1]["error"]
    assert runs_a_process(box)


def test_removed_and_purged(box: Box) -> None:
    box.run("dpkg", "-r", "cc-proxy")
    assert "active" not in box.active(*UNITS)
    assert not box.has("/usr/lib/cc-proxy")
    assert box.has(SETTINGS)
    box.run("dpkg", "-P", "cc-proxy")
    left = [
        "/etc/cc-proxy",
        "/etc/apparmor.d/usr.sbin.cc-proxy",
        "/run/cc-oci-runtime/proxy.sock",
        "/var/lib/systemd/deb-systemd-helper-enabled/cc-proxy.socket.dsh-also",
    ]
    assert [path for path in left if box.has(path)] == []
    assert "cc-proxy" not in box.output("systemctl", "list-unit-files")


def test_clients_that_never_stop_asking_keep_no_daemon_that_was_removed(box: Box) -> None:
    with asking(box.root / DEFAULT_SOCKET[1:]):
        for package in ("cc-proxy", "newer", "cc-proxy"):  # again, an upgrade, a downgrade
            box.run("dpkg", "--install", f"/srv/{package}.deb")
            assert runs_a_process(box)
        for how in ("--remove", "--purge"):
            box.run("dpkg", "--install", "/srv/cc-proxy.deb")
            box.run("dpkg", how, "cc-proxy")
            assert "active" not in box.active(*UNITS)
            assert box.run("pgrep", "-u", "cc-proxy", check=False).stdout == ""
            assert not box.has(DEFAULT_SOCKET)


# The journal, with native fields.


def test_the_journal_finds_events_by_vm(box: Box) -> None:
    box.run("cc-proxyctl", "run", "--local", "--id", "web", "--", "true")
    box.run("cc-proxyctl", "run", "--local", "--id", "other", "--", "true")
    events = [json.loads(line) for line in box.log("CC_VM=web").splitlines()]
    assert {event["vm"] for event in events} == {"web"}
    assert "VM registered" in {event["message"] for event in events}


def test_priorities_and_the_identifier_are_the_journals(box: Box) -> None:
    box.run("sed", "-i", "1i nonsense = 1", SETTINGS)
    box.run("systemctl", "reload", "cc-proxy.service")
    box.run("journalctl", "--sync")
    shown = box.output("journalctl", "-t", "cc-proxy", "-p", "err", "-o", "json", "--lines=1")
    event = json.loads(shown)
    assert (event["SYSLOG_IDENTIFIER"], event["PRIORITY"]) == ("cc-proxy", "3")
    assert "nonsense" in event["CC_ERROR"]


def test_a_journal_that_takes_nothing_holds_nobody_up_and_what_it_missed_is_counted(box: Box) -> None:
    box.run("cc-proxyctl", "log-level", "debug")  # a line for each request
    with stopped_journal(box), Client(box.root / DEFAULT_SOCKET[1:], timeout=30) as client:
        for _ in range(6_000):  # more than the journal's socket and the daemon's queue hold together
            with pytest.raises(Refused):
                client.attach("nobody")
    wait_for_log(box, "dropped_before")


@contextmanager
def stopped_journal(box: Box) -> Iterator[None]:
    """A journal that is there and takes nothing."""
    pid = box.output("systemctl", "show", "--property=MainPID", "--value", "systemd-journald.service")
    box.run("kill", "-STOP", pid)
    try:
        yield
    finally:
        box.run("kill", "-CONT", pid)


def wait_for_log(box: Box, text: str) -> None:
    """Has the daemon log until there is something with a text in the journal."""
    deadline = time.monotonic() + 30
    while text not in box.log("-t", "cc-proxy"):
        assert time.monotonic() < deadline, f"no {text!r} in the journal"
        box.run("cc-proxyctl", "ping", "nobody", check=False)


def test_a_journal_that_is_away_stops_nobody_and_what_it_missed_is_counted(box: Box) -> None:
    journal = ("systemd-journald.socket", "systemd-journald-dev-log.socket", "systemd-journald.service")
    box.run("systemctl", "stop", *journal)
    assert runs_a_process(box)
    box.run("systemctl", "start", *journal)
    box.run("cc-proxyctl", "log-level", "debug")
    wait_for_log(box, "lost_before")
