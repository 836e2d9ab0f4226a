"""What is made of what a guest and QEMU have said."""

from __future__ import annotations

import pytest

from cc_proxy.ctl.vm.words import first_complaint, last_words, panic

PANIC = """\
[    1.010101] Some driver: hello
[    2.020202] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)
[    2.030303] CPU: 0 PID: 1 Comm: swapper/0 Not tainted
[    2.040404] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0) ]---
"""
AGENT = """\
\x1b[2J\x1b[1;1HSeaBIOS (version 1)\r
Traceback (most recent call last):\r
ModuleNotFoundError: No module named 'x'\r
[    3.030303] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\r
[    3.040404] Kernel Offset: 0x1\r
"""


@pytest.mark.parametrize(
    ("console", "words"),
    [
        ("", ""),
        ("\r\n \r\n", ""),
        (PANIC, "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"),
        (
            AGENT,
            "ModuleNotFoundError: No module named 'x'; "
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
        ),
        ("cc-proxy agent: no port\r\n[    4.0] reboot: Power down\r\n", "cc-proxy agent: no port"),
        ("[    4.0] reboot: Power down\r\n", "[    4.0] reboot: Power down"),
    ],
)
def test_last_words(console: str, words: str) -> None:
    assert last_words(console) == words


def test_panic() -> None:
    assert panic("all is well\n") == ""
    assert panic(PANIC).startswith("Kernel panic - not syncing: VFS")


def test_first_complaint() -> None:
    assert first_complaint("\nqemu: warning: x\nqemu: error: y\nAssertion failed\n") == "qemu: error: y"
    assert first_complaint("qemu: warning: x\n") == ""
