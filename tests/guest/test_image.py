"""What the guest is made of."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.image import ROOT

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


def test_the_same_bytes_every_time(guest: Path, tmp_path: Path) -> None:
    again = tmp_path / "a longer name, and another umask"
    sources = [ROOT / "build" / name for name in ("guest-packages", "guest-modules")]
    subprocess.run(
        [sys.executable, ROOT / "packaging/guest/image.py", *sources, again],
        check=True,
        umask=0o077,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    for name in ("vmlinuz", "initramfs"):
        assert (again / name).read_bytes() == (guest / name).read_bytes(), name


def test_it_is_small(guest: Path) -> None:
    assert (guest / "initramfs").stat().st_size < 16 * 1024 * 1024


def test_what_is_in_it_is_listed_with_its_licence(guest: Path) -> None:
    bill = json.loads((guest / "sbom.spdx.json").read_text())
    listed = {package["name"]: package for package in bill["packages"]}
    fetched = {path.name.partition("_")[0] for path in (ROOT / "build/guest-packages").iterdir()}
    assert set(listed) == fetched | {"cc_proxy", "msgspec"}
    for package in listed.values():
        assert (guest / package["licenseComments"]).stat().st_size
        assert package["versionInfo"] != "NOASSERTION"
    assert re.fullmatch(r"(\S+ \(= \S+\)(, |\n$))+", (guest / "built-using").read_text())


def test_nothing_of_this_machine_is_in_it(guest: Path) -> None:
    content = gzip.decompress((guest / "initramfs").read_bytes())
    assert str(ROOT).encode() not in content
    assert b"compileall" in content  # it was looked through unpacked
