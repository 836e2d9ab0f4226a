"""The daemon in a box, as its units make systemd start it, and a VM to go with it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.api import DEFAULT_SOCKET, Client, Refused
from tests.systemd.box import CHECKOUT, WAIT, Box

UNITS = CHECKOUT / "packaging" / "systemd"
SERVICE = "cc-proxy.service"
SOCKET = "cc-proxy.socket"
SETTINGS = "/etc/cc-proxy/cc-proxy.toml"

_DROP_IN = "/run/systemd/system/{}.d/test.conf"


class Service:
    """cc-proxy.service and cc-proxy.socket in a box."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._cursor = self._end_of_journal()
        self._changed: set[str] = set()

    @classmethod
    def install(cls, box: Box) -> None:
        """Put everything where a package puts it, and do what its scripts do."""
        for program, directory in (("cc-proxy", "sbin"), ("cc-proxyctl", "bin")):
            box.run("ln", "-s", f"{sys.prefix}/bin/{program}", f"/usr/{directory}/{program}")
        box.install(CHECKOUT / "conf" / "cc-proxy.toml", SETTINGS)
        box.install(UNITS / "cc-proxy.sysusers", "/usr/lib/sysusers.d/cc-proxy.conf")
        box.install(UNITS / "cc-proxy.tmpfiles", "/usr/lib/tmpfiles.d/cc-proxy.conf")
        for unit in (SERVICE, SOCKET):
            box.install(UNITS / unit, f"/usr/lib/systemd/system/{unit}")
        box.run("systemd-sysusers", "cc-proxy.conf")
        box.run("systemd-tmpfiles", "--create", "cc-proxy.conf")
        box.run("systemctl", "daemon-reload")

    @property
    def socket_file(self) -> Path:
        """The socket that clients connect to."""
        return self.box.path(DEFAULT_SOCKET)

    @property
    def pid(self) -> int:
        """The daemon's, as the box counts; 0 if none runs."""
        return int(self.show("MainPID"))

    def start(self, unit: str) -> None:
        """Start a unit and wait until it is up."""
        self.box.run("systemctl", "start", unit)

    def fails_to_start(self, unit: str) -> bool:
        """Try to start a unit; returns whether that failed."""
        return self.box.run("systemctl", "start", unit, check=False).returncode != 0

    def stop(self, unit: str) -> None:
        """Stop a unit and wait until it is."""
        self.box.run("systemctl", "stop", unit)

    def kill(self, signal: str) -> None:
        """Send the daemon a signal."""
        self.box.run("systemctl", "kill", f"--signal={signal}", "--kill-whom=main", SERVICE)

    def show(self, name: str, unit: str = SERVICE) -> str:
        """Return one of a unit's properties."""
        return self.box.output("systemctl", "show", "--value", f"--property={name}", unit)

    def wait_for(self, name: str, value: str, unit: str = SERVICE) -> None:
        """Wait until a property of a unit has a value."""
        deadline = time.monotonic() + WAIT
        while (now := self.show(name, unit)) != value:
            assert time.monotonic() < deadline, f"{name} is {now!r} and not {value!r}"

    def drop_in(self, text: str, unit: str = SERVICE) -> None:
        """Change a unit until the test ends."""
        self.box.write(_DROP_IN.format(unit), text)
        self._changed.add(unit)
        self.box.run("systemctl", "daemon-reload")

    def undo(self, unit: str = SERVICE) -> None:
        """Change a unit back."""
        self.box.path(_DROP_IN.format(unit)).unlink()
        self._changed.discard(unit)
        self.box.run("systemctl", "daemon-reload")

    def configure(self, text: str) -> None:
        """Write the settings file until the test ends."""
        self.box.write(SETTINGS, text)

    def client(self) -> Client:
        """Connect as root."""
        return Client(self.socket_file, timeout=WAIT)

    def is_whole(self) -> bool:
        """Whether the daemon answers, and both units know that they belong together."""
        with self.client() as client, pytest.raises(Refused):
            client.attach("nobody")
        self.wait_for("ActiveState", "active")
        return self.show("SubState", SOCKET) == "running"

    def logged(self) -> list[dict[str, Any]]:
        """What the daemon has logged since the test began."""
        self.box.run("journalctl", "--sync")
        # systemd 252 skips one entry too many with --after-cursor and a match.
        shown = self.box.output(
            "journalctl", "--quiet", f"--cursor={self._cursor}", "-o", "json", "-t", "cc-proxy"
        )
        entries: list[dict[str, Any]] = [json.loads(line) for line in shown.splitlines()]
        return [entry for entry in entries if entry["__CURSOR"] != self._cursor]

    def wait_for_log(self, text: str, times: int = 1) -> dict[str, Any]:
        """Wait until the journal has got something with `text` in it, so many times; returns the last."""
        follow = ("journalctl", "--follow", "--lines=all", f"--cursor={self._cursor}", "-o", "json", *_OURS)
        with self.box.lines_of(*follow) as lines:
            for line in lines:
                entry: dict[str, Any] = json.loads(line)
                times -= text in str(entry["MESSAGE"]) and entry["__CURSOR"] != self._cursor
                if not times:
                    return entry
        raise AssertionError(f"the journal ended without {text!r}")

    def reset(self) -> None:
        """Stop everything and undo what a test has changed."""
        for unit in self._changed:
            self.box.path(_DROP_IN.format(unit)).unlink()
        self.box.install(CHECKOUT / "conf" / "cc-proxy.toml", SETTINGS)
        # Stopped first: once its configuration is another, a socket unit forgets what it has open.
        commands = [
            f"stop {SOCKET} {SERVICE}",
            f"unmask --runtime --quiet {SOCKET} {SERVICE}",
            "reset-failed",
        ]
        commands[2:2] = ["daemon-reload"] if self._changed else []
        self.box.run("sh", "-c", "; ".join(f"systemctl {command}" for command in commands))

    def _end_of_journal(self) -> str:
        shown = self.box.output("journalctl", "--lines=0", "--show-cursor", "--quiet")
        return shown.removeprefix("-- cursor: ")


#: What the daemon said, or systemd about it.
_OURS = ("SYSLOG_IDENTIFIER=cc-proxy", "+", "UNIT=cc-proxy.service", "+", "UNIT=cc-proxy.socket")


@contextmanager
def vm(box: Box, directory: str, user: str) -> Iterator[tuple[str, str]]:
    """A VM whose sockets are in a directory of `user`'s that nobody else can enter; yields ctl and io."""
    box.run("install", "-d", "-m", "0700", "-o", user, directory)
    ctl, io = f"{directory}/ctl", f"{directory}/io"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent = ("cc-proxyctl", "agent", "--ctl", ctl, "--io", io, "--ready-fd", str(theirs.fileno()))
        with subprocess.Popen(box.command(*agent, user=user), pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            try:
                assert ours.recv(1), "the agent did not start"
                yield ctl, io
            finally:
                ours.close()  # the agent ends with it
                process.wait(WAIT)
    box.run("rm", "-r", directory)
