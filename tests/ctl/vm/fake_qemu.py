"""Stands in for QEMU: understands the command line that cc-proxyctl gives it, and what that says over QMP.

The words that were added to the kernel's command line are what it does once it is told to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys


class FakeQemu:
    def __init__(self, command: list[str]) -> None:
        line = " ".join(command)
        self.accelerator = command[command.index("-accel") + 1]
        self.steps = command[command.index("-append") + 1].partition("reboot=t")[2].split()
        fds = {found[1]: int(found[2]) for found in re.finditer(r"socket,id=(\w+),fd=(\d+)", line)}
        self.listener = socket.socket(fileno=fds["qmp"])
        self.console = os.open(line.partition("id=console,path=")[2].split()[0], os.O_WRONLY)

    def run(self) -> None:
        if "deaf" in self.steps:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "needs-emulation" in self.steps and self.accelerator == "kvm":
            sys.exit("qemu: warning: something else\nqemu: kvm is broken\nqemu: and so on")
        if "starts" not in self.steps:
            sys.exit("qemu: -nonsense: invalid option")
        with self.listener.accept()[0] as self.qmp:
            self.tell({"QMP": {}})
            told = b""
            while b'"cont"' not in told:
                told += self.qmp.recv(4096)
            self.event("RESUME")
            for step in self.steps:
                name, _, text = step.partition(":")
                if do := getattr(self, name.replace("-", "_"), None):
                    do(text.replace("_", " "))
            while True:
                signal.pause()

    def tell(self, message: dict[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            self.qmp.sendall(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: object) -> None:
        self.tell({"event": name, "data": data})

    # Steps ---

    def boots(self, _text: str) -> None:
        for port in ("ctl", "io"):
            self.event("VSERPORT_CHANGE", open=True, id=port)

    def says(self, text: str) -> None:
        os.write(self.console, text.encode() + b"\r\n")

    def says_when_told(self, text: str) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: self.says(text))

    def floods(self, _text: str) -> None:
        for _ in range(1024):
            os.write(self.console, b"x" * 1023 + b"\n")

    def complains(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def powers_off(self, _text: str) -> None:
        self.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        sys.exit()

    def dies(self, _text: str) -> None:
        sys.exit(1)


if __name__ == "__main__":
    FakeQemu(sys.argv).run()
