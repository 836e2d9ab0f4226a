"""What systemd says of the units without starting them."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from tests.systemd.box import Box

UNIT_FILES = ("/usr/lib/systemd/system/cc-proxy.service", "/usr/lib/systemd/system/cc-proxy.socket")

CAPABILITIES = "CAP_DAC_OVERRIDE CAP_SETUID CAP_SETGID"
#: What systemd 252 misses in the service, and the line that says why.
EXCEPTIONS = {
    "AmbientCapabilities=": f"AmbientCapabilities={CAPABILITIES}",
    "CapabilityBoundingSet=~CAP_(DAC_*|FOWNER|IPC_OWNER)": f"CapabilityBoundingSet={CAPABILITIES}",
    "CapabilityBoundingSet=~CAP_SET(UID|GID|PCAP)": f"CapabilityBoundingSet={CAPABILITIES}",
    "DeviceAllow=": "ProtectClock=yes",
    "PrivateTmp=": "PrivateTmp=no",
    "PrivateUsers=": "PrivateUsers=no",
    "ProtectHome=": "ProtectHome=read-only",
    "RestrictAddressFamilies=~AF_UNIX": "RestrictAddressFamilies=AF_UNIX",
    "RootDirectory=/RootImage=": "ProtectSystem=strict",
    "SystemCallFilter=~@privileged": "SystemCallFilter=setresuid setresgid setgroups capset",
}


def test_systemd_finds_no_fault_with_the_units(box: Box) -> None:
    # A unit that is verified calls in those it needs, and this machine's may have faults of their own.
    said = box.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", *UNIT_FILES)
    assert said.stdout == ""


def test_the_service_is_as_hardened_as_it_can_be(box: Box) -> None:
    box.run("systemd-analyze", "security", "--offline=yes", "--threshold=13", "--no-pager", UNIT_FILES[0])


def test_each_exception_to_that_is_explained_beside_its_line(box: Box) -> None:
    shown = box.output("systemd-analyze", "security", "--offline=yes", "--json=short", UNIT_FILES[0])
    lacking = {entry["name"] for entry in json.loads(shown) if entry["exposure"]}
    assert lacking == set(EXCEPTIONS)
    explained = explained_lines(box.path(UNIT_FILES[0]).read_text())
    assert [line for line in EXCEPTIONS.values() if line not in explained] == []


def explained_lines(unit: str) -> set[str]:
    """The lines of a unit that stand below a comment which says why they are an exception."""
    explained: set[str] = set()
    comment = ""
    for is_comment, lines in groupby(unit.splitlines(), lambda line: line.startswith("#")):
        if is_comment:
            comment = " ".join(lines)
        elif "# Exception: " in comment:
            explained.update(lines)
    return explained


@pytest.mark.parametrize("unit", ["cc-proxy.service", "cc-proxy.socket"])
def test_a_unit_can_be_enabled_and_disabled(box: Box, unit: str) -> None:
    box.run("systemctl", "enable", unit)
    assert box.output("systemctl", "is-enabled", "cc-proxy.socket") == "enabled"
    box.run("systemctl", "disable", "cc-proxy.service", "cc-proxy.socket")


def test_the_settings_stay_roots(box: Box) -> None:
    assert box.output("stat", "--format=%U:%G %a", "/etc/cc-proxy") == "root:root 755"


def test_the_socket_directory_lets_the_group_through_and_nobody_write(box: Box) -> None:
    assert box.output("stat", "--format=%U:%G %a", "/run/cc-oci-runtime") == "root:cc-proxy 750"
