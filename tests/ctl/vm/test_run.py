"""`run --vm`, with stand-ins for QEMU and the proxy: what is said, and that nothing is left in any case."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ctl.fake_proxy import FakeProcess, FakeProxy, exits
from tests.ctl.running import ctl, popen_piped
from tests.ctl.test_single import error_line
from tests.ctl.vm.processes import children_of, ended, wait_until
from tests.ctl.window import Window
from tests.users import needs_root

RUN = ("run", "--vm", "--id", "pod", "--append")
BOOTS = "starts boots"
OPTIONS = "are --memory, --cpus, --machine and --qemu-arg right?"


@pytest.fixture(autouse=True)
def used(settings: Path) -> None:
    """All of them use the stand-in."""


def test_the_vm_is_registered_once_it_has_booted(proxy: FakeProxy, directories: Path) -> None:
    there: list[Path] = []
    proxy.when_asked["hello"] = lambda: there.extend(directories.glob("*/*"))
    proxy.script = exits(7)
    assert ctl(proxy, *RUN, BOOTS, "--", "x") == 7
    said = proxy.wait_for("hello").arguments
    for member, name in (("ctlSerial", "ctl"), ("ioSerial", "io"), ("console", "console")):
        assert Path(said[member]) in there, name


def test_it_says_nothing_where_stderr_is_no_terminal(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ctl(proxy, *RUN, BOOTS, "--", "x") == 0
    assert capfd.readouterr() == ("", "")


def test_there_is_progress_on_a_terminal(proxy: FakeProxy, window: Window) -> None:
    with window.start(proxy.path, *RUN, "starts", "--boot-timeout", "0.5", "--", "x") as child:
        assert child.wait() == 125
    assert b"\r\x1b[Kcc-proxyctl: the VM boots: 0 s\r\x1b[Kcc-proxyctl: the VM is not ready" in os.read(
        window.user, 4096
    )


def test_a_vm_that_does_not_boot(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(proxy, *RUN, "starts says:no_port", "--boot-timeout", "1", "--", "x") == 125
    assert error_line(capfd) == (
        "the VM is not ready after 1 s: no port "
        "(do --kernel and --image fit, and is --memory enough?; or wait longer: --boot-timeout)"
    )
    assert proxy.names == []


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ("", f"QEMU failed: qemu: -nonsense: invalid option ({OPTIONS})"),
        ("starts dies", "QEMU failed: it did not say why"),
        ("starts complains:qemu:_out_of_memory dies", f"QEMU failed: qemu: out of memory ({OPTIONS})"),
        (
            "starts says:Kernel_panic_-_not_syncing:_no_init powers-off",
            "the VM ended before it was ready: Kernel panic - not syncing: no init "
            "(do --kernel and --image fit, and is --memory enough?)",
        ),
        (
            "starts says:cc-proxy_agent:_no_port;_name_it powers-off",
            "the VM ended before it was ready: cc-proxy agent: no port; name it",
        ),
    ],
)
def test_a_vm_that_ends_before_it_is_ready(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], steps: str, complaint: str
) -> None:
    assert ctl(proxy, *RUN, steps, "--", "x") == 125
    assert error_line(capfd) == complaint
    assert proxy.names == []


def test_a_vm_that_is_lost_says_why(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    def lost(process: FakeProcess) -> None:
        process.io.close()

    proxy.script = lost
    steps = f"{BOOTS} says:Kernel_panic_-_not_syncing:_sysrq powers-off"
    assert ctl(proxy, *RUN, steps, "--", "x") == 125
    assert error_line(capfd).endswith("(Kernel panic - not syncing: sysrq)")


# What is missing ---


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--qemu", "no-such-qemu", "no-such-qemu: no program that can be run (install it (Debian: apt-get"),
        ("--qemu", "/etc/passwd", "/etc/passwd: no program that can be run (install it (Debian: apt-get"),
        ("--kernel", "/no/such", "/no/such: No such file or directory (install cc-proxy-guest, or run `make"),
        ("--kernel", "/etc/passwd", "/etc/passwd: not a Linux kernel (install cc-proxy-guest, or run `make"),
        ("--image", "/no/such", "/no/such: No such file or directory (install cc-proxy-guest, or run `make"),
        ("--image", "/etc/passwd", "/etc/passwd: not an initramfs (install cc-proxy-guest, or run `make"),
        ("--guest", "/no/such", "/no/such: cannot be read: No such file or directory"),
    ],
)
def test_what_is_missing(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], option: str, value: str, complaint: str
) -> None:
    assert ctl(proxy, *RUN, BOOTS, option, value, "--", "x") == 125
    assert error_line(capfd).startswith(complaint)


@pytest.mark.parametrize("length", [70, 71, 200])
def test_paths_of_sockets_are_never_too_long(
    proxy: FakeProxy, tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A directory whose name leaves no room is not used."""
    directory = tmp_sock_dir / ("x" * (length - len(str(tmp_sock_dir)) - 1))
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    assert ctl(proxy, *RUN, BOOTS, "--", "x") == 0
    used = proxy.wait_for("hello").arguments["console"]
    assert len(used) < 108
    assert used.startswith(f"{directory}/") == (length == 70)


@needs_root
@pytest.mark.parametrize("limit", ["nr_inodes=2", "size=4096"])
def test_a_full_disk(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], directories: Path, limit: str
) -> None:
    full = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(directories)]
    if subprocess.run(full, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (directories / "all").write_bytes(bytes(4096))
        assert ctl(proxy, *RUN, BOOTS, "--", "x") == 125
        assert [path.name for path in directories.iterdir()] == ["all"]
    finally:
        subprocess.run(["umount", directories], check=True)
    text = error_line(capfd)
    assert text.startswith(f"{directories}/cc-proxyctl-vm-")
    assert ": No space left on device (the directory named by TMPDIR, or else /run or" in text


def kvm(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("cc_proxy.ctl.vm.checks._KVM", path)


@pytest.mark.parametrize("accelerator", ["auto", "kvm"])
def test_no_kvm(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, accelerator: str
) -> None:
    kvm(monkeypatch, "/no/such")
    status = ctl(proxy, *RUN, BOOTS, "--accelerator", accelerator, "--", "x")
    hint = "load the module kvm_intel or kvm_amd, or do without KVM: --accelerator tcg"
    expected = {
        "auto": (0, "/no/such: No such file or directory: the VM is emulated, which is slower"),
        "kvm": (125, f"/no/such: No such file or directory ({hint})"),
    }
    assert (status, error_line(capfd)) == expected[accelerator]


def test_no_rights_on_kvm(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/sys/kernel/uevent_seqnum"  # even root may only read it
    kvm(monkeypatch, path)
    assert ctl(proxy, *RUN, BOOTS, "--accelerator", "kvm", "--", "x") == 125
    assert error_line(capfd) == (
        f"{path}: Permission denied "
        "(become root or a member of its group, or do without KVM: --accelerator tcg)"
    )


@pytest.mark.parametrize("accelerator", ["auto", "kvm"])
def test_a_kvm_that_does_not_work(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, accelerator: str
) -> None:
    kvm(monkeypatch, "/dev/null")
    status = ctl(proxy, *RUN, f"needs-emulation {BOOTS}", "--accelerator", accelerator, "--", "x")
    expected = {
        "auto": (0, "KVM does not work (qemu: kvm is broken): the VM is emulated, which is slower"),
        "kvm": (125, "QEMU failed: qemu: kvm is broken (do without KVM: --accelerator tcg)"),
    }
    assert (status, error_line(capfd)) == expected[accelerator]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--accelerator", "kvm"], "do without KVM: --accelerator tcg; or wait longer: --boot-timeout"),
        (["--machine", "microvm"], "microvm may hang without KVM: --machine pc"),
    ],
)
def test_a_kind_of_vm_that_is_known_to_hang(
    proxy: FakeProxy,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    hint: str,
) -> None:
    kvm(monkeypatch, "/dev/null")
    assert ctl(proxy, *RUN, "starts", *options, "--boot-timeout", "0.3", "--", "x") == 125
    assert error_line(capfd) == f"the VM is not ready after 0.3 s: its console says nothing ({hint})"


def test_what_has_nothing_to_do_with_kvm_is_not_laid_to_its_charge(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kvm(monkeypatch, "/dev/null")
    assert ctl(proxy, *RUN, "nonsense", "--accelerator", "auto", "--", "x") == 125
    assert error_line(capfd) == f"QEMU failed: qemu: -nonsense: invalid option ({OPTIONS})"


# Ends ---


def start(proxy: FakeProxy, steps: str) -> subprocess.Popen[bytes]:
    return popen_piped(proxy.path, *RUN, steps, "--", "x")


def owner_and_qemu(child: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Return the pids of the process that owns QEMU, and of that, once they are there."""
    wait_until(lambda: any(children_of(pid) for pid in children_of(child.pid)))
    (owner,) = children_of(child.pid)
    (qemu,) = children_of(owner)
    return owner, qemu


def test_a_signal_ends_a_vm_that_boots(proxy: FakeProxy, directories: Path) -> None:
    with start(proxy, "starts") as child:
        pids = owner_and_qemu(child)
        child.terminate()
        assert child.communicate() == (b"", b"")
        assert child.returncode == 128 + signal.SIGTERM
        assert ended(*pids)
        assert list(directories.iterdir()) == []
    assert proxy.names == []


def test_who_insists_does_not_wait_for_a_vm_that_does_not_end(proxy: FakeProxy) -> None:
    with start(proxy, "starts deaf") as child:
        owner, qemu = owner_and_qemu(child)
        os.kill(owner, signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(3):
            child.terminate()
            select.select([], [], [], 0.05)
        child.communicate()
        assert child.returncode == 128 + signal.SIGTERM
        assert time.monotonic() - began < 9  # less than the owner is given otherwise
        wait_until(lambda: ended(owner, qemu))


@pytest.mark.parametrize("steps", ["starts", BOOTS])
def test_nothing_outlives_a_command_that_is_killed(proxy: FakeProxy, directories: Path, steps: str) -> None:
    proxy.script = waits
    with start(proxy, steps) as child:
        pids = owner_and_qemu(child)
        if steps == BOOTS:
            proxy.wait_for("newcontainer")
        child.kill()
        child.communicate()
        wait_until(lambda: ended(*pids))
        assert list(directories.iterdir()) == []


def test_qemu_does_not_outlive_its_owner(proxy: FakeProxy, directories: Path) -> None:
    with start(proxy, "starts") as child:
        owner, qemu = owner_and_qemu(child)
        os.kill(owner, signal.SIGKILL)
        assert child.communicate() == (b"", b"cc-proxyctl: QEMU failed: it did not say why\n")
        wait_until(lambda: ended(owner, qemu))
        assert list(directories.iterdir()) == []


def waits(process: FakeProcess) -> None:
    process.receive()


def test_a_guest_that_floods_its_console_fills_no_disk(proxy: FakeProxy, directories: Path) -> None:
    proxy.script = waits
    with start(proxy, f"{BOOTS} floods says:that_was_all") as child:
        proxy.wait_for("newcontainer")
        (log,) = (path for path in directories.glob("*/*.log") if path.name != "qemu.log")
        wait_until(lambda: b"that was all" in log.read_bytes())
        assert log.stat().st_size < 128 * 1024
        pids = owner_and_qemu(child)
        child.kill()
        child.communicate()
        wait_until(lambda: ended(*pids))


def test_the_same_id_twice(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.script = waits
    with start(proxy, BOOTS) as child:
        proxy.wait_for("newcontainer")
        assert ctl(proxy, *RUN, BOOTS, "--", "x") == 125
        assert error_line(capfd) == "pod: a VM with this id runs already (`cc-proxyctl vm stop pod` ends it)"
        pids = owner_and_qemu(child)
        child.kill()
        child.communicate()
        wait_until(lambda: ended(*pids))


def test_what_was_left_is_removed(proxy: FakeProxy, directories: Path) -> None:
    """Only if everybody who could have was killed at once."""
    (directories / "cc-proxyctl-vm-0123456789ab").mkdir()
    (directories / "cc-proxyctl-vm-0123456789ab" / "ctl").touch()
    assert ctl(proxy, *RUN, BOOTS, "--", "x") == 0


# Misuse ---


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--local", "--vm"], "--local starts an agent, --vm a VM: one of them"),
        (
            ["--vm", "--ctl", "/c"],
            "--local and --vm have sockets of their own: no --ctl and --io",
        ),
        (["--vm", "--console", "/c"], "--vm has a console of its own: no --console"),
        (
            ["--local", "--memory", "1"],
            "--memory says how to start a VM: it goes with `run --vm` or `vm start`",
        ),
        (
            ["--local", "--qemu-arg=-s"],
            "--qemu-arg says how to start a VM: it goes with `run --vm` or `vm start`",
        ),
    ],
)
def test_options_that_do_not_go_together(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert ctl(proxy, "run", *options, "--", "x") == 2
    assert error_line(capfd) == complaint


@pytest.mark.parametrize("amount", ["0", "-1", "1G", "99999999999"])
@pytest.mark.parametrize(("option", "most"), [("--memory", 16_777_216), ("--cpus", 1_024)])
def test_amounts(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], option: str, most: int, amount: str
) -> None:
    assert ctl(proxy, *RUN, BOOTS, f"{option}={amount}", "--", "x") == 2
    assert f"argument {option}: '{amount}' is not a number from 1 to {most}\n" in capfd.readouterr().err
