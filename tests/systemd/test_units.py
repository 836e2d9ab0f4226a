"""What systemd says of the units without starting them."""

from __future__ import annotations

import pytest

from tests.systemd.box import Box

UNIT_FILES = ("/usr/lib/systemd/system/cc-proxy.service", "/usr/lib/systemd/system/cc-proxy.socket")


def test_systemd_finds_no_fault_with_the_units(box: Box) -> None:
    # A unit that is verified calls in those it needs, and this machine's may have faults of their own.
    said = box.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", *UNIT_FILES)
    assert said.stdout == ""


def test_the_service_is_as_hardened_as_it_can_be(box: Box) -> None:
    box.run("systemd-analyze", "security", "--offline=yes", "--threshold=13", "--no-pager", UNIT_FILES[0])


@pytest.mark.parametrize("unit", ["cc-proxy.service", "cc-proxy.socket"])
def test_a_unit_can_be_enabled_and_disabled(box: Box, unit: str) -> None:
    box.run("systemctl", "enable", unit)
    assert box.output("systemctl", "is-enabled", "cc-proxy.socket") == "enabled"
    box.run("systemctl", "disable", "cc-proxy.service", "cc-proxy.socket")


def test_the_settings_stay_roots(box: Box) -> None:
    assert box.output("stat", "--format=%U:%G %a", "/etc/cc-proxy") == "root:root 755"


def test_the_socket_directory_lets_the_group_through_and_nobody_write(box: Box) -> None:
    assert box.output("stat", "--format=%U:%G %a", "/run/cc-oci-runtime") == "root:cc-proxy 750"
