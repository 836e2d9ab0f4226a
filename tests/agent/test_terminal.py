"""Processes with a terminal, with another user, with limits: what is done between fork and exec."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cc_proxy.hyperstart.codes import Code
from tests.agent.host import Host

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@pytest.fixture
def host(program_host: Host) -> Host:
    """Of an agent that is a program: in a test with threads, Python 3.12 has its doubts about forking."""
    return program_host


def start_terminal(host: Host, *args: str, stderr: int = 0, **more: Any) -> None:
    host.start(*args, terminal=True, stderr=stderr, **more)


def test_a_controlling_terminal_of_that_size(host: Host) -> None:
    start_terminal(host, "sh", "-c", "stty size; stty size </dev/tty; echo err >&2; tty", rows=33, columns=77)
    output, status = host.run_to_end()
    lines = output[1].decode().split("\r\n")
    assert lines[:3] == ["33 77", "33 77", "err"]
    assert lines[3].startswith("/dev/pts/")
    assert status == 0


def test_the_terminal_echoes_and_has_signals(host: Host) -> None:
    start_terminal(host, "sh", "-c", "trap 'echo INT; exit 5' INT; echo up; cat")
    host.read_until(1, b"up\r\n")
    host.feed(1, b"line\n")
    host.read_until(1, b"line\r\nline\r\n")
    host.feed(1, b"\x03")
    output, status = host.run_to_end()
    assert output[1].endswith(b"INT\r\n")
    assert status == 5


def test_an_empty_frame_is_no_end_of_file_for_a_terminal(host: Host) -> None:
    start_terminal(host, "sh", "-c", "stty -echo; echo up; read x; echo $x")
    host.read_until(1, b"up\r\n")
    host.feed(1)
    host.feed(1, b"alive\n")
    assert host.run_to_end() == ({1: b"alive\r\n"}, 0)


def test_the_end_of_file_of_a_terminal(host: Host) -> None:
    start_terminal(host, "sh", "-c", "stty -echo; echo up; cat; echo end")
    host.read_until(1, b"up\r\n")
    host.feed(1, b"\x04")
    assert host.run_to_end() == ({1: b"end\r\n"}, 0)


def test_winsize(host: Host) -> None:
    start_terminal(host, "sh", "-c", "trap 'stty size; exit 0' WINCH; stty -echo; echo up; read x; read x")
    host.read_until(1, b"up\r\n")
    host.ok(Code.WINSIZE, {"seq": 1, "row": 24, "column": 80})
    # The shell may have been about to read, and see its signal only when it has.
    host.feed(1, b"\n")
    output, _ = host.run_to_end()
    assert output[1].replace(b"\r\n", b"") == b"24 80"


def test_a_stderr_of_its_own(host: Host) -> None:
    start_terminal(host, "sh", "-c", "echo A; echo B >&2; test -t 1 && ! test -t 2", stderr=2)
    assert host.run_to_end() == ({1: b"A\r\n", 2: b"B\n"}, 0)
    host.start_pod()
    host.refused(
        Code.NEW_CONTAINER,
        {"id": "c", "process": {"terminal": True, "args": ["true"], "stdio": 1, "stderr": 1}},
    )


def test_much_output_of_a_terminal(host: Host) -> None:
    start_terminal(host, "sh", "-c", "stty -onlcr; head -c 300000 /dev/zero | tr '\\0' x")
    assert host.run_to_end() == ({1: b"x" * 300_000}, 0)


def test_a_missing_binary_on_a_terminal(host: Host) -> None:
    process = {"terminal": True, "args": ["/no/such"], "stdio": 1}
    host.refused(Code.NEW_CONTAINER, {"id": "c", "process": process})
    host.fence()


@as_root
def test_user_and_groups(host: Host) -> None:
    host.start("sh", "-c", "id -u; id -g; id -G", user="54321", group="54322", additionalGroups=["54323"])
    assert host.run_to_end() == ({1: b"54321\n54322\n54322 54323\n"}, 0)


@as_root
def test_a_user_can_open_his_terminal(host: Host) -> None:
    start_terminal(host, "sh", "-c", "id -un >$(tty)", user="daemon")
    assert host.run_to_end() == ({1: b"daemon\r\n"}, 0)


def test_limits(host: Host) -> None:
    limits = [
        {"type": "nofile", "soft": 50, "hard": 60},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 2**64 - 1},
    ]
    host.start("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -Sc", rlimits=limits)
    assert host.run_to_end() == ({1: b"50\n60\n0\n"}, 0)


def test_limits_that_cannot_be(host: Host) -> None:
    limits = [{"type": "nofile", "soft": 60, "hard": 50}]
    host.refused(
        Code.NEW_CONTAINER,
        {"id": "c", "process": {"args": ["true"], "stdio": 1, "stderr": 2, "rlimits": limits}},
    )
    host.fence()
