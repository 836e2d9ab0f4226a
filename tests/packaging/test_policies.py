"""The AppArmor profile and the SELinux module: those who load them take them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).parents[2] / "packaging"
PROFILE = PACKAGING / "apparmor" / "usr.sbin.cc-proxy"
FEATURES = Path("/etc/apparmor.d/abi/3.0")
MODULE = PACKAGING / "selinux"
MAKEFILE = Path("/usr/share/selinux/devel/Makefile")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to succeed; returns what it said."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(not FEATURES.exists(), reason="apparmor is not installed")
def test_apparmor_takes_the_profile_without_a_warning(tmp_path: Path) -> None:
    options = ("--skip-kernel-load", "--skip-cache", f"--features-file={FEATURES}", "--warn=all")
    assert run("apparmor_parser", *options, PROFILE, cwd=tmp_path) == ""


@pytest.mark.skipif(not MAKEFILE.exists(), reason="selinux-policy-dev is not installed")
def test_the_selinux_module_compiles(tmp_path: Path) -> None:
    shutil.copytree(MODULE, tmp_path, dirs_exist_ok=True)
    said = run("make", "-f", MAKEFILE, "cc_proxy.pp", cwd=tmp_path)
    assert (tmp_path / "cc_proxy.pp").stat().st_size
    assert "warning" not in said.lower()


@pytest.mark.skipif(not MAKEFILE.exists(), reason="selinux-policy-dev is not installed")
def test_its_interfaces_can_be_used(tmp_path: Path) -> None:
    shutil.copytree(MODULE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runtime.te").write_text(
        "policy_module(runtime, 1.0)\n"
        "type runtime_t; type vm_t; type vm_runtime_t;\n"
        "domain_type(runtime_t)\ndomain_type(vm_t)\nfiles_type(vm_runtime_t)\n"
        "cc_proxy_stream_connect(runtime_t)\ncc_proxy_connects_to(vm_t, vm_runtime_t)\n"
    )
    assert "error" not in run("make", "-f", MAKEFILE, "runtime.pp", cwd=tmp_path).lower()
