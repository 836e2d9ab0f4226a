"""Sockets from systemd: what is taken, what is refused, and what is none of this process's business."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.linux import systemd
from cc_proxy.linux.systemd import ActivationError, Notifier, take_listener
from tests.proxy.support import open_fds
from tests.shortages import few_fds

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
NOTIFY = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *NOTIFY):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listener(tmp_sock_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_sock_dir / "sock"))
        listener.listen()
        yield listener


def activate(
    monkeypatch: pytest.MonkeyPatch, fd: int, *, pid: str | None = None, count: str | None = "1"
) -> None:
    """The first fd passed is `fd`, not 3, which is somebody else's here."""
    monkeypatch.setattr(systemd, "_FIRST_FD", fd)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if pid is None else pid)
    if count is not None:
        monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_FDNAMES", "cc-proxy.socket")


def test_process_that_was_not_activated() -> None:
    assert take_listener() is None


def test_the_socket_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    passed = os.dup(listener.fileno())
    os.set_inheritable(passed, True)
    activate(monkeypatch, passed)
    sock = take_listener()
    assert sock
    with sock:
        assert sock.fileno() == passed
        assert not sock.get_inheritable()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.getsockname())
            sock.accept()[0].close()
    assert not any(name in os.environ for name in VARIABLES), "no child is to believe them"
    assert take_listener() is None


@pytest.mark.parametrize(
    ("pid", "count"), [("1", "1"), ("", "1"), ("nonsense", "1"), ("-1", "1"), (None, None), (None, "")]
)
def test_what_is_meant_for_another_process_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, pid: str | None, count: str | None
) -> None:
    before = open_fds()
    activate(monkeypatch, listener.fileno(), pid=pid, count=count)
    assert take_listener() is None
    assert open_fds() == before
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize("count", ["2", "0", "-1", "nonsense", "1.0", "99999999999999999999"])
def test_other_than_one_socket(monkeypatch: pytest.MonkeyPatch, listener: socket.socket, count: str) -> None:
    activate(monkeypatch, listener.fileno(), count=count)
    with pytest.raises(
        ActivationError, match=rf"LISTEN_FDS={count} \(cc-proxy\.socket\), .* exactly one socket: leave"
    ):
        take_listener()
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("stream that does not listen", "it does not listen; set Accept=no"),
        ("datagram", "it is for datagrams or packets; use ListenStream="),
        ("TCP", "it is a network socket; give ListenStream= in cc-proxy.socket a path"),
        ("connected", "it does not listen; set Accept=no"),
    ],
)
def test_socket_of_another_kind_is_refused_and_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_sock_dir: Path, kind: str, says: str
) -> None:
    family = socket.AF_INET if kind == "TCP" else socket.AF_UNIX
    kinds = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
    before = set(open_fds())
    if kind == "connected":
        sock, peer = socket.socketpair()
        peer.close()
    else:
        sock = socket.socket(family, kinds)
    if kind == "TCP":
        sock.bind(("127.0.0.1", 0))
        sock.listen()
    activate(monkeypatch, sock.detach())
    with pytest.raises(ActivationError, match=f"not a listening AF_UNIX stream socket: {says}"):
        take_listener()
    assert set(open_fds()) == before


def test_fd_that_is_no_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        activate(monkeypatch, file.fileno())
        with pytest.raises(
            ActivationError, match="passed as a socket, is none: Socket operation on non-socket"
        ):
            take_listener()
        assert os.fstat(file.fileno())


def test_fd_that_is_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    near.close()
    far.close()
    fd = os.dup(0)
    os.close(fd)
    activate(monkeypatch, fd)
    with pytest.raises(ActivationError, match=f"fd {fd}, passed as a socket, is none: Bad file descriptor"):
        take_listener()


def test_names_of_all_sockets_are_said(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    activate(monkeypatch, listener.fileno(), count="2")
    monkeypatch.setenv("LISTEN_FDNAMES", "cc-proxy.socket:stored")
    with pytest.raises(ActivationError, match=r"LISTEN_FDS=2 \(cc-proxy\.socket, stored\)"):
        take_listener()


def test_more_names_than_sockets(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    activate(monkeypatch, listener.fileno())
    monkeypatch.setenv("LISTEN_FDNAMES", "a:b")
    with pytest.raises(ActivationError, match=r"LISTEN_FDS=1 \(a, b\), but .* exactly one socket"):
        take_listener()


# sd_notify --------------------------------------------------------------------------------------------------


@pytest.fixture
def notifier() -> Iterator[list[Notifier]]:
    """Those in it are closed at the end."""
    made: list[Notifier] = []
    yield made
    for one in made:
        one.close()


@pytest.mark.parametrize("abstract", [True, False])
def test_manager_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_sock_dir: Path, notifier: list[Notifier], abstract: bool
) -> None:
    path = f"{tmp_sock_dir}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
        notifier.append(told := Notifier())
        assert "NOTIFY_SOCKET" not in os.environ, "no child is to speak for this process"
        assert told.wanted
        assert told.tell("READY=1", "STATUS=two\nlines")
        assert manager.recv(1000) == b"READY=1\nSTATUS=two lines"
    assert not told.tell("STATUS=x")
    assert "refused" in told.error or "No such file" in told.error
    told.close()
    assert not told.tell("STATUS=x")


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1"])
def test_without_a_manager_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, notifier: list[Notifier], address: str | None
) -> None:
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier.append(told := Notifier())
    assert not told.wanted
    assert not told.tell("READY=1")


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_sock_dir: Path) -> Iterator[socket.socket]:
    """One that reads nothing by itself."""
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_sock_dir}/notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_sock_dir}/notify")
        yield manager


def test_manager_that_does_not_read_is_not_waited_for(
    manager: socket.socket, notifier: list[Notifier]
) -> None:
    notifier.append(told := Notifier())
    while told.tell("WATCHDOG=1", wait=False):
        pass
    assert "temporarily unavailable" in told.error
    before = time.thread_time()
    assert not told.tell("WATCHDOG=1")
    assert told.error == "timed out"
    assert time.thread_time() - before < 0.1, "it waits, and does not ask over and over"
    manager.recv(1000)
    assert told.tell("WATCHDOG=1", wait=False)


def test_manager_that_cannot_be_asked_has_not_heard(manager: socket.socket, notifier: list[Notifier]) -> None:
    notifier.append(told := Notifier())
    with few_fds():
        assert not told.is_heard()
        assert "Too many open files" in told.error
        assert told.tell("READY=1"), "that takes no fd"


def test_manager_that_was_started_again_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_sock_dir: Path, notifier: list[Notifier]
) -> None:
    path = tmp_sock_dir / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    notifier.append(told := Notifier())
    for number in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(path))
            assert told.tell(f"STATUS={number}")
            assert manager.recv(1000) == b"STATUS=%d" % number
        path.unlink()
        assert not told.tell("STATUS=x")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", "own", 30.0),
        ("500000", None, 0.5),
        ("30000000", "1", None),
        ("30000000", "", None),
        ("0", None, None),
        ("-1", None, None),
        ("x", None, None),
        (None, "own", None),
    ],
)
def test_watchdog(
    monkeypatch: pytest.MonkeyPatch,
    notifier: list[Notifier],
    usec: str | None,
    pid: str | None,
    seconds: float | None,
) -> None:
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    notifier.append(found := Notifier())
    assert found.watchdog == seconds
    assert not any(name in os.environ for name in NOTIFY)
