"""A machine for one test run: a real systemd as PID 1, over a throw-away copy of this machine's own root.

systemd-nspawn makes the container. Around it are namespaces of our own, for what it leaves behind when it is
killed: its processes die with it, and its mounts and directories are seen by nobody else.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

#: Seconds that anything in the box may take.
WAIT = 30.0

_TOOLS = ("systemd-nspawn", "unshare", "setpriv", "nsenter", "jq")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/", "TERM": "dumb"}

# Ends with the process that started it, whatever becomes of that.
_ENTER_CGROUP = r"""
echo 0 >"$1/cgroup.procs"
shift
exec setpriv --pdeathsig KILL \
    unshare --mount --pid --cgroup --fork --kill-child=KILL --propagation private "$@"
"""

# The cgroups look like those of a machine without version 1, whatever this one has. nspawn takes a name in
# /tmp for its overlay, and notes in /run what it does.
_SET_UP = """
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir /run/machine /run/outside
mount --bind / /run/machine
mount --rbind / /run/outside
mount -t tmpfs tmpfs /tmp
exec systemd-nspawn "$@"
"""

_NSPAWN = (
    "--directory=/run/machine",
    "--volatile=overlay",
    "--machine=box",
    "--settings=no",
    "--register=no",
    "--keep-unit",
    "--private-network",
    "--link-journal=no",
    "--resolv-conf=off",
    "--timezone=off",
    "--notify-ready=yes",
    "--console=pipe",
    "--quiet",
)
# Nothing of what this machine has enabled but the journal and the like.
_BOOT = ("--boot", "--", "--unit=sysinit.target", "--show-status=no", "--log-target=journal")


class BoxFailed(Exception):
    """The box did not start; the text is what it said."""


def what_is_missing() -> str:
    """Say why there can be no box on this machine; nothing if there can."""
    if os.geteuid():
        return "only root can boot a systemd of its own"
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: systemd-container, util-linux, jq)"
    if not _cgroup_root():
        return "no cgroup v2 hierarchy is mounted"
    unshared = subprocess.run(["unshare", "--mount", "--pid", "--cgroup", "--fork", "true"], check=False)
    return "this machine allows no new namespaces" if unshared.returncode else ""


class Box:
    """A running box. The package and the interpreter of the tests are where they are outside, read-only."""

    def __init__(self, leader: int) -> None:
        #: The box's root directory, seen from outside.
        self.root = Path(f"/proc/{leader}/root")
        self._enter = ["nsenter", f"--target={leader}", "--all", "env", "-i"]
        self._enter += [f"{name}={value}" for name, value in _ENVIRONMENT.items()]

    @classmethod
    @contextmanager
    def boot(cls) -> Iterator[Box]:
        """Boot one; it is gone, with all that ran in it, at the end. Raises `BoxFailed`."""
        with _cgroup() as cgroup, _notify_socket() as notified:
            visible = [f"--bind-ro=/run/outside{path}:{path}" for path in _visible()]
            command = ["sh", "-euc", _ENTER_CGROUP, "sh", str(cgroup), "sh", "-euc", _SET_UP, "sh"]
            process = subprocess.Popen(
                [*command, *_NSPAWN, *visible, *_BOOT],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=_ENVIRONMENT | _nspawn_environment(notified), text=True,
            )  # fmt: skip
            try:
                _wait_ready(process, notified)
                # nspawn passes on what the box's systemd says; once this is full, both would wait for ever.
                notified.close()
                box = cls(int((cgroup / "payload/init.scope/cgroup.procs").read_text().split()[0]))
                box.open_the_way()
                yield box
            finally:
                process.kill()
                process.communicate()

    def command(self, *argv: str, user: str = "root", group: str = "") -> list[str]:
        """The command line that runs a command in the box, from outside."""
        groups = f"--groups={group}" if group else "--clear-groups"
        # nsenter forks for the PID namespace: what it started is to end with it.
        identity = ("setpriv", "--pdeathsig=KILL", f"--reuid={user}", f"--regid={user}", groups)
        return [*self._enter, *identity, *argv]

    def run(
        self, *argv: str, user: str = "root", group: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and capture what it prints. If it fails, so does the test, unless not `check`."""
        done = subprocess.run(
            self.command(*argv, user=user, group=group),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=WAIT, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout}")
        return done

    def output(self, *argv: str) -> str:
        """What a command prints, without the last line's end."""
        return self.run(*argv).stdout.rstrip("\n")

    @contextmanager
    def lines_of(self, *argv: str) -> Iterator[Iterator[str]]:
        """The lines that a command prints while it runs; it is killed at the end."""
        with subprocess.Popen(self.command(*argv), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                yield iter(process.stdout)
            finally:
                process.kill()

    def path(self, path: str) -> Path:
        """Where a path of the box is outside."""
        return self.root / path.lstrip("/")

    def install(self, source: Path, path: str) -> None:
        """Copy a file into the box."""
        self.write(path, source.read_text())

    def write(self, path: str, text: str) -> None:
        """Write a file in the box, with the directories it needs."""
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def open_the_way(self) -> None:
        """Let every user of the box reach what is visible, as they could if it were installed."""
        visible = _visible()
        for directory in {parent for path in visible for parent in path.parents}:
            if not any(directory.is_relative_to(path) for path in visible):  # that is read-only, and as it is
                self.run("chmod", "a+x", str(directory))


def _visible() -> list[Path]:
    """What the daemon needs that may be in a place which the box does not show.

    Not the whole checkout: tox keeps its environments in a directory of it that other users cannot enter.
    """
    paths = {CHECKOUT / "cc_proxy", Path(sys.prefix), Path(sys.base_prefix)} - {Path("/usr")}
    return sorted(paths)


def _cgroup_root() -> Path | None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)


@contextmanager
def _cgroup() -> Iterator[Path]:
    """A cgroup of the box's own; removed once its last process is gone."""
    root = _cgroup_root()
    assert root
    path = root / f"cc-proxy-box-{secrets.token_hex(4)}"
    path.mkdir()
    try:
        yield path
    finally:
        _wait_empty(path)
        for directory, _, _ in os.walk(path, topdown=False):
            os.rmdir(directory)


def _wait_empty(cgroup: Path) -> None:
    """Wait until no process is left: the kernel ends those of a PID namespace some time after its first."""
    with open(cgroup / "cgroup.events", encoding="ascii") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            assert poll.poll(WAIT * 1000), f"{cgroup} still has processes"
            events.seek(0)


def _nspawn_environment(notified: socket.socket) -> dict[str, str]:
    """Where nspawn says that the box is up; and no seccomp filter of nspawn's, for machines have none."""
    address = notified.getsockname()[1:].decode()
    return {"NOTIFY_SOCKET": f"@{address}", "SYSTEMD_SECCOMP": "0"}


@contextmanager
def _notify_socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # the kernel chooses an abstract address, which is seen from every mount namespace
        yield sock


def _wait_ready(process: subprocess.Popen[str], notified: socket.socket) -> None:
    """Wait until the box's systemd has said that it is up. Raises `BoxFailed`."""
    assert process.stdout
    poll = select.poll()
    poll.register(notified, select.POLLIN)
    poll.register(process.stdout, select.POLLIN)
    said = ""
    while ready := poll.poll(WAIT * 1000):
        if notified.fileno() in dict(ready):
            if "READY=1" in notified.recv(4096).decode().split("\n"):
                return
            continue
        line = process.stdout.readline()
        if not line:
            raise BoxFailed(f"the box ended:\n{said}")
        said += line
    raise BoxFailed(f"the box was not up in {WAIT:g} s:\n{said}")
