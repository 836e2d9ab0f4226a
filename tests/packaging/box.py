"""A throw-away Debian 12 with a real systemd as PID 1, in namespaces. Needs root.

It has no network but for what a test runs with one: apt, which gets packages from Debian's archive.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

# What boots, and what the tests look with: nothing of what the packages depend on.
INCLUDE = "systemd,systemd-sysv,dbus,libnss-systemd,procps,man-db"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cc-proxy" / "debian-12-minimal"
# Where there are control groups of version 1 too, those of version 2 are a level below.
CGROUPS = Path("/sys/fs/cgroup/unified")
if not CGROUPS.exists():
    CGROUPS = CGROUPS.parent
BOOT_TIMEOUT = 60.0
NETWORK_TIMEOUT = 600.0
STOP_TIMEOUT = 10.0
POLL_INTERVAL = 0.05
# What systemd takes for "halt at once", when it is PID 1 of a container.
HALT = signal.SIGRTMIN + 13
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}

ALL_BUT_THE_NETWORK = ["--mount", "--uts", "--ipc", "--pid", "--cgroup"]

# $1: a directory, $2: the root to lay the overlay on, $3: what appears as /srv, $4: a control group.
_OUTER = """
echo $$ >"$4/cgroup.procs"
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
mkdir -p "$1/root/srv"
mount --bind "$3" "$1/root/srv"
: >"$1/root/etc/machine-id"
cp --dereference /etc/resolv.conf "$1/root/etc/resolv.conf"
cd "$1/root"
exec unshare --pid --fork --kill-child=SIGKILL --mount --uts --ipc --net --cgroup bash -euc "$INNER"
"""
_INNER = """
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid tmpfs dev
mkdir dev/pts dev/shm
for device in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "dev/${device%:*}" c 1 "${device#*:}"
done
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx  # PrivateDevices= looks for it
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
mkdir run/old
pivot_root . run/old
umount -l /run/old
exec env -i container=box /lib/systemd/systemd --system --show-status=false --log-target=journal
"""


def debian() -> Path:
    """Returns the root of a minimal Debian 12: the cached one, or a new one from Debian's archive."""
    if not (CACHE / "etc" / "debian_version").exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=CACHE.parent))
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={INCLUDE}",
            "bookworm",
            str(partial),
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.rmtree(CACHE, ignore_errors=True)
        partial.rename(CACHE)
    return CACHE


class Box:
    """One such system, from `with` to the end of its block; `share` is its /srv."""

    def __init__(self, share: Path) -> None:
        self._share = share

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="ccp-box-"))
        self._cgroup = CGROUPS / self._directory.name
        self._cgroup.mkdir()
        self._outer = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "bash", "-euc", _OUTER, "box"]
            + [str(path) for path in (self._directory, debian(), self._share, self._cgroup)],
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT | {"INNER": _INNER},
        )
        try:
            self._wait_until_booted()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def root(self) -> Path:
        """Its root directory, seen from outside."""
        return Path(f"/proc/{self._init}/root")

    def run(
        self, *command: str, check: bool = True, network: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in it; returns what it printed, stderr with stdout."""
        result = subprocess.run(
            ["nsenter", "-t", str(self._init), *(ALL_BUT_THE_NETWORK if network else ["-a"]), *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=ENVIRONMENT, check=False, timeout=NETWORK_TIMEOUT if network else BOOT_TIMEOUT,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{command}: status {result.returncode}\n{result.stdout}"
        return result

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Runs a command in it, with pipes to it and from it; it has to end by itself."""
        with subprocess.Popen(
            ["nsenter", "-t", str(self._init), "-a", *command], env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            yield process

    def output(self, *command: str) -> str:
        """Returns what a command prints, without the last line's end."""
        return self.run(*command).stdout.rstrip("\n")

    def has(self, path: str) -> bool:
        """Whether something is at a path."""
        return self.run("test", "-e", path, check=False).returncode == 0

    def active(self, *units: str) -> list[str]:
        """Returns the state of each unit."""
        return self.run("systemctl", "is-active", *units, check=False).stdout.split()

    def apt(self, command: str, *arguments: str) -> str:
        """Has apt do something that may take packages from Debian's archive; returns what it said."""
        return self.run("apt-get", "--quiet", "--yes", command, *arguments, network=True).stdout

    def log(self, *matches: str) -> str:
        """Returns the messages in the journal that fit, all of them that anybody has sent by now."""
        self.run("journalctl", "--sync")
        return self.output("journalctl", "--quiet", "-o", "cat", *matches)

    def _wait_until_booted(self) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        while time.monotonic() < deadline and self._outer.poll() is None:
            if (init := children.read_text().split()) and Path(
                f"/proc/{init[0]}/root/run/systemd/private"
            ).exists():
                self._init = int(init[0])
                state = self.run("systemctl", "is-system-running", "--wait", check=False)
                if state.stdout.strip() in {"running", "degraded"}:
                    return
            select.select([], [], [], POLL_INTERVAL)
        raise TimeoutError(f"no systemd after {BOOT_TIMEOUT:.0f} s")

    def _end(self) -> None:
        if hasattr(self, "_init"):
            os.kill(self._init, HALT)
        try:
            self._outer.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._outer.kill()
            self._outer.wait()
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(directory)
        self._directory.rmdir()
