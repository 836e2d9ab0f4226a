"""Booting a VM: from the start of QEMU until the guest's agent has opened both ports."""

import select
import sys
import time
from contextlib import closing
from types import TracebackType
from typing import Any, Self

from cc_proxy.ctl.errors import Failure, say
from cc_proxy.ctl.vm.command import PORTS
from cc_proxy.ctl.vm.machine import Machine
from cc_proxy.ctl.vm.qmp import Qmp

#: Seconds between two looks at the clock.
_TICK = 0.25
#: The agent's own lines on the console begin with this.
_AGENT = "cc-proxy agent: "
_OPTIONS = "are --memory, --cpus, --machine and --qemu-arg right?"
_LOOK = "do --kernel and --image fit, and is --memory enough?"


class QemuFailed(Failure):
    """QEMU ended, though its guest did not shut down: the accelerator or one of the options is to blame."""

    def __init__(self, complaint: str) -> None:
        """`complaint` is what QEMU said; empty if it said nothing."""
        self.complaint = complaint or "it did not say why"
        super().__init__(f"QEMU failed: {self.complaint}", hint=_OPTIONS if complaint else "")


class BootWatch:
    """Waits for one VM to boot."""

    def __init__(self, machine: Machine, note: str, advice: str) -> None:
        """`note` is said once the guest runs. `advice` says what to do if the guest is not ready in time."""
        self._machine = machine
        self._note = note
        self._advice = advice
        self._runs = False
        self._shut_down = False
        self._closed_ports = set(PORTS)

    def wait(self, seconds: float) -> None:
        """Wait until the guest's agent has opened its ports.

        Raises `Failure` if the VM ends first, or if that takes more than `seconds`.
        """
        try:
            qmp = Qmp(self._machine.qmp_path)
        except OSError:
            raise self._ended() from None
        began = time.monotonic()
        with closing(qmp), _Progress() as progress:
            qmp.send("qmp_capabilities")
            qmp.send("cont")
            while self._closed_ports:
                self._wait_a_tick(qmp)
                if qmp.at_eof:
                    raise self._ended()
                age = time.monotonic() - began
                if age > seconds:
                    words = self._machine.last_words()
                    text = f"the VM is not ready after {seconds:g} s: {words}"
                    raise Failure(text, hint=self._advice or f"{_LOOK}; or wait longer: --boot-timeout")
                if self._runs:
                    progress.show(f"the VM boots: {age:.0f} s")

    def _wait_a_tick(self, qmp: Qmp) -> None:
        poll = select.poll()
        poll.register(qmp, select.POLLIN)
        if poll.poll(_TICK * 1000):
            for message in qmp.receive():
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"event": "RESUME"}:
                self._runs = True
                if self._note:
                    say(self._note)
            case {"event": "VSERPORT_CHANGE", "data": {"open": True, "id": port}}:
                self._closed_ports.discard(port)
            case {"event": "SHUTDOWN"}:
                self._shut_down = True

    def _ended(self) -> Failure:
        """Return the failure to report for a VM that ended too early."""
        self._machine.wait_until_ended()
        if not self._shut_down:
            return QemuFailed(self._machine.complaint())
        words = self._machine.last_words()
        # The agent itself says what to do.
        hint = "" if words.startswith(_AGENT) else _LOOK
        return Failure(f"the VM ended before it was ready: {words}", hint=hint)


class _Progress:
    """A line on stderr, if that is a terminal. The end of the context erases it."""

    def __init__(self) -> None:
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._write("")

    def show(self, text: str) -> None:
        if text != self._shown and sys.stderr is not None and sys.stderr.isatty():
            self._shown = text
            self._write(f"cc-proxyctl: {text}")

    def _write(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
