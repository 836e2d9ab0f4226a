"""Fixtures of the tests of VMs whose QEMU is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ctl.vm import fake_qemu


@pytest.fixture
def directories(tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the directories of VMs are made. Nothing is left there."""
    directory = tmp_sock_dir / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


@pytest.fixture
def settings(tmp_path: Path, directories: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings that have a stand-in started, and files that look like a kernel and an image."""
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!{sys.executable} -S\n{Path(fake_qemu.__file__).read_text()}")
    qemu.chmod(0o755)
    (tmp_path / "kernel").write_bytes(bytes(0x202) + b"HdrS")
    (tmp_path / "image").write_bytes(b"\x1f\x8b")
    file = tmp_path / "guest.toml"
    file.write_text(f'qemu = "{qemu}"\nkernel = "kernel"\nimage = "image"\naccelerator = "tcg"\n')
    monkeypatch.setenv("CC_PROXY_GUEST", str(file))
    return file
