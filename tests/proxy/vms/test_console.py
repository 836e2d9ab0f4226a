"""A VM's console: whatever it writes, in whatever pieces, becomes lines of a bounded length."""

from __future__ import annotations

import logging
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.api.payloads import Hello
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.proxy.vms.console import Console, LineSplitter
from cc_proxy.proxy.vms.dialer import Connected
from tests.proxy.conftest import Logged
from tests.proxy.support import DIALER, open_fds
from tests.wire.support import WAIT, at_end

#: Bytes of a line in the log.
LONGEST_LINE = 1_024


def lines_of(*pieces: bytes) -> list[str]:
    splitter = LineSplitter()
    return [line for piece in pieces for line in splitter.receive_data(piece)] + splitter.finish()


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ((), []),
        ((b"",), []),
        ((b"one\ntwo\r\nthree",), ["one", "two", "three"]),
        ((b"\n\r\n\n\r",), []),
        ((b"o", b"n", b"e\r", b"\ntwo", b"\n"), ["one", "two"]),
        ((b"login: ",), ["login: "]),
        (("é€😀".encode(),), ["é€😀"]),
        (("é".encode()[:1], "é".encode()[1:]), ["é"]),
        ((b"\xff\xfe\n",), [r"\xff\xfe"]),
        ((b"\x1b[31mred\x00\n",), ["\x1b[31mred\x00"]),
    ],
)
def test_lines(pieces: tuple[bytes, ...], lines: list[str]) -> None:
    assert lines_of(*pieces) == lines


@pytest.mark.parametrize("length", [1_023, 1_024, 1_025, 2_048, 5_000, 100_000])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_long_lines_are_cut(length: int, end: bytes) -> None:
    """Also when their end comes in the same read."""
    lines = lines_of(b"x" * length + end)
    assert "".join(lines) == "x" * length
    assert max(map(len, lines)) <= LONGEST_LINE


@pytest.mark.parametrize("seed", range(5))
def test_any_garbage_in_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(
        rng.choice([b"\n", b"\r\n", b"\r", rng.randbytes(rng.randrange(3_000))]) for _ in range(200)
    )
    expected = lines_of(*(data[at : at + 1] for at in range(len(data))))
    for _ in range(10):
        pieces, at = [], 0
        while at < len(data):
            size = rng.randrange(1, 20_000)
            pieces.append(data[at : at + size])
            at += size
        lines = lines_of(*pieces)
        assert "".join(lines) == "".join(expected)
        assert all(lines)


def test_what_is_kept_is_bounded() -> None:
    splitter = LineSplitter()
    for _ in range(100):
        splitter.receive_data(b"x" * 10_000)
        assert len(splitter.rest) < LONGEST_LINE


def test_nothing_is_left_after_the_end() -> None:
    splitter = LineSplitter()
    splitter.receive_data(b"rest")
    assert splitter.finish() == ["rest"]
    assert splitter.finish() == []
    assert splitter.receive_data(b"new\n") == ["new"]


# The socket -----------------------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_sock_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_sock_dir / "console"))
        listener.listen()
        listener.setblocking(False)
        yield listener


def opened(path: str) -> tuple[Console | None, Connected]:
    """The console of a VM whose channels are there."""
    with ExitStack() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp")))
        for name in ("ctl", "io"):
            channel = undo.enter_context(socket.socket(socket.AF_UNIX))
            channel.bind(str(directory / name))
            channel.listen()
        hello = Hello("vm", str(directory / "ctl"), str(directory / "io"), path)
        connected = DIALER.connect(hello, WAIT)
        connected.ctl.close()
        connected.io.close()
    return Console.open("vm", path, connected), connected


def test_vm_without_a_console_has_none(logged: Logged) -> None:
    logger.setLevel(CONSOLE)
    assert opened("")[0] is None
    assert logged.records == []


@pytest.mark.parametrize(
    ("pieces", "last"),
    [
        ([], ""),
        ([b"\n\n"], ""),
        ([b"Loading Linux\n", b"Kernel panic\n"], "Loading Linux | Kernel panic"),
        ([b"one\r\ntwo\r\n", b"login: "], "one | two | login: "),
        ([b"\x1b[31mred\x07\n"], r"\x1b[31mred\x07"),
        ([b"\xff\n", "\u202e\n".encode()], r"\xff | \u202e"),
        ([b"x" * 10_000 + b"\n", b"y" * 600 + b"\n"], "y" * 500),
        ([b"first\n", b"x" * 490 + b"\n", b"end\n"], "x" * 490 + " | end"),
    ],
)
@pytest.mark.parametrize("level", [logging.WARNING, CONSOLE])
@pytest.mark.parametrize("hangs_up", [False, True])
def test_last_lines(pieces: list[bytes], last: str, level: int, hangs_up: bool, logged: Logged) -> None:
    """Whether they were read before or not, at whatever level."""
    logger.setLevel(level)
    near, far = socket.socketpair()
    console = Console("vm", near)
    with far:
        for piece in pieces:
            far.sendall(piece)
            console.read()
        if hangs_up:
            far.close()
        assert console.last_lines() == last
    console.close()


@pytest.mark.parametrize("path", ["/nowhere/console", "/with\0nul", "/" + "x" * 200, "relative"])
def test_console_that_cannot_be_reached_is_a_warning(logged: Logged, path: str) -> None:
    before = set(open_fds())
    console, connected = opened(path)
    assert console is None
    assert logged.at(logging.WARNING) == ["console cannot be read"]
    (fields,) = logged.fields("console cannot be read")
    assert fields == {"vm": "vm", "console": path, "error": connected.console_error}
    assert connected.console_error.startswith("console: ")
    assert set(open_fds()) == before


def test_console_whose_backlog_is_full_is_not_waited_for(tmp_sock_dir: Path, logged: Logged) -> None:
    path = str(tmp_sock_dir / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        console, connected = opened(path)
    assert console is None
    assert connected.console_error == f"console: cannot connect to {path}: not accepted in time"
    assert logged.at(logging.WARNING) == ["console cannot be read"]


def test_console_is_read_to_its_end(listener: socket.socket, logged: Logged) -> None:
    logger.setLevel(CONSOLE)
    console, _ = opened(listener.getsockname())
    assert console
    far, _ = listener.accept()
    assert console.read(), "nothing is there, and more may come"
    far.sendall(b"one\ntwo\nlogin: ")
    assert console.read()
    assert logged.fields("console") == [{"vm": "vm", "line": "one"}, {"vm": "vm", "line": "two"}]
    assert {record.levelno for record in logged.records} == {CONSOLE}
    far.close()
    assert not console.read()
    assert logged.fields("console")[2:] == [{"vm": "vm", "line": "login: "}]
    console.close()
    assert console.fileno() == -1


def test_its_peer_reads_the_end_though_a_duplicate_is_kept() -> None:
    near, far = socket.socketpair()
    with near.dup(), far:
        far.sendall(b"unread")
        Console("vm", near).close()
        assert at_end(far)


def test_console_that_breaks_has_come_to_its_end(logged: Logged) -> None:
    near, far = socket.socketpair()
    console = Console("vm", near)
    near.sendall(b"what it never reads, which the kernel calls a reset")
    far.close()
    assert not console.read()
    console.close()
