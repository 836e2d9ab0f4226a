"""A VM's console: whatever it writes, in whatever pieces, becomes lines of a bounded length."""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.proxy.vms.console import _LONGEST_LINE, Console, LineSplitter
from cc_proxy.proxy.vms.dialer import Dialer
from tests.proxy.conftest import Logged
from tests.proxy.support import DIALER, new_share, open_fds
from tests.wire.support import WAIT, in_background


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
    assert max(map(len, lines)) <= _LONGEST_LINE


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
        assert len(splitter._rest) < _LONGEST_LINE


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


def test_console_is_not_dialled_unless_the_log_wants_it(listener: socket.socket, logged: Logged) -> None:
    assert Console.open("vm", listener.getsockname(), DIALER) is None
    with pytest.raises(BlockingIOError):
        listener.accept()
    logger.setLevel(CONSOLE)
    assert Console.open("vm", "", DIALER) is None
    assert logged.records == []


@pytest.mark.parametrize("path", ["/nowhere/console", "/with\0nul", "/" + "x" * 200, "relative"])
def test_console_that_cannot_be_reached_is_a_warning(logged: Logged, path: str) -> None:
    logger.setLevel(CONSOLE)
    before = set(open_fds())
    assert Console.open("vm", path, DIALER) is None
    assert logged.at(logging.WARNING) == ["console cannot be read"]
    (fields,) = logged.fields("console cannot be read")
    assert (fields["vm"], fields["console"], bool(fields["error"])) == ("vm", path, True)
    assert set(open_fds()) == before


def test_console_whose_backlog_is_full_is_not_waited_for(tmp_sock_dir: Path, logged: Logged) -> None:
    logger.setLevel(CONSOLE)
    path = str(tmp_sock_dir / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        assert Console.open("vm", path, DIALER) is None
    assert logged.at(logging.WARNING) == ["console cannot be read"]


def test_console_waits_for_its_turn_while_another_hello_of_the_user_connects(
    listener: socket.socket, logged: Logged
) -> None:
    logger.setLevel(CONSOLE)
    share, begun = new_share(), threading.Event()

    def take_turn() -> None:
        with share.dialing:
            begun.set()
            threading.Event().wait(0.01)

    with in_background(take_turn):
        assert begun.wait(WAIT)
        console = Console.open("vm", listener.getsockname(), Dialer(Credentials.own(), share))
    assert console
    console.close()
    assert logged.at(logging.WARNING) == []


def test_console_is_read_to_its_end(listener: socket.socket, logged: Logged) -> None:
    logger.setLevel(CONSOLE)
    console = Console.open("vm", listener.getsockname(), DIALER)
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


def test_console_that_breaks_has_come_to_its_end(logged: Logged) -> None:
    near, far = socket.socketpair()
    console = Console("vm", near)
    near.sendall(b"what it never reads, which the kernel calls a reset")
    far.close()
    assert not console.read()
    console.close()
