"""Connecting to what a client names: nothing but what that client could connect to, and never the daemon."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from cc_proxy.api.payloads import Hello
from cc_proxy.linux.credentials import Credentials
from cc_proxy.linux.fds import may_hold_fds
from cc_proxy.proxy.vms.dialer import CannotConnect, Connected, Dialer
from tests.proxy.support import DIALER, NEVER, dialer_of, open_fds
from tests.users import ALICE, BOB, ROOT, give, needs_root
from tests.wire.support import WAIT, is_silent


@pytest.fixture
def listener(open_dir: Path) -> Iterator[socket.socket]:
    """A VM's, in a directory of Alice's, which others may go through."""
    directory = open_dir / "vm"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "ctl"))
        listener.listen()
        listener.settimeout(WAIT)
        yield listener


def path_of(listener: socket.socket) -> Path:
    return Path(listener.getsockname())


def connect(dialer: Dialer, path: Path | str, timeout: float = WAIT) -> Connected:
    """Both channels are at one place."""
    return dialer.connect(Hello("vm", str(path), str(path)), timeout)


def refusal(dialer: Dialer, path: Path | str, member: str = "ctlSerial") -> str:
    """Why it is not connected to; nothing is left open."""
    before = set(open_fds())
    with tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as directory:
        there = f"{directory}/x"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(there)
            other.listen()
            Path(directory).chmod(0o755)
            Path(there).chmod(0o777)
            hello = Hello("vm", str(path), there) if member == "ctlSerial" else Hello("vm", there, str(path))
            with pytest.raises(CannotConnect) as error:
                dialer.connect(hello, 0.5)
    assert set(open_fds()) <= before
    return str(error.value)


# Paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "relative/path", "/with\0nul", "\0abstract", "@abstract", "./x"])
@pytest.mark.parametrize("member", ["ctlSerial", "ioSerial"])
def test_path_that_is_none(path: str, member: str) -> None:
    assert refusal(DIALER, path, member) == f"{member}: not an absolute path: {path!r}"


@pytest.mark.parametrize(("path", "size"), [("/" + "x" * 107, 108), ("/" + "é" * 54, 109)])
def test_path_that_is_too_long(path: str, size: int) -> None:
    assert refusal(DIALER, path) == f"ctlSerial: a path of {size} bytes, the limit is 107"


def test_path_of_107_bytes(tmp_sock_dir: Path) -> None:
    path = str(tmp_sock_dir / "x")
    path += "x" * (107 - len(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with connect(DIALER, path):
            pass


def test_who_is_connected_to_cannot_pass_fds(listener: socket.socket) -> None:
    with connect(DIALER, path_of(listener)) as connected:
        peer, _ = listener.accept()
        with peer:
            if may_hold_fds(connected.ctl):
                pytest.skip("needs Linux 6.16")
            with pytest.raises(PermissionError):
                socket.send_fds(peer, [b"x"], [0])


def test_socket_whose_backlog_is_full_is_waited_for_no_longer_than_that(tmp_sock_dir: Path) -> None:
    path = str(tmp_sock_dir / "full")
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        for member in ("ctlSerial", "ioSerial"):
            assert (
                refusal(DIALER, path, member) == f"{member}: cannot connect to {path}: not accepted in time"
            )


def test_path_that_is_far_too_long_is_not_said_again() -> None:
    assert refusal(DIALER, "\x7f" * 1_000_000) == "ctlSerial: a path of 1000000 bytes, the limit is 107"


def test_what_is_no_stream_socket(tmp_sock_dir: Path) -> None:
    (tmp_sock_dir / "file").write_text("")
    os.mkfifo(tmp_sock_dir / "fifo")
    (tmp_sock_dir / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_sock_dir / "stale"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_sock_dir / "datagrams"))
        causes = {
            "": "it is not a socket",
            "file": "it is not a socket",
            "fifo": "it is not a socket",
            "stale": "Connection refused",
            "loop": "Too many levels of symbolic links",
            "file/x": "Not a directory",
            "nothing": "No such file or directory",
            "datagrams": "Protocol wrong type for socket",
        }
        for name, cause in causes.items():
            path = f"{tmp_sock_dir}/{name}"
            assert refusal(DIALER, path) == f"ctlSerial: cannot connect to {path}: {cause}"


def test_open_files_of_the_daemon_are_none_of_the_clients_business(tmp_sock_dir: Path) -> None:
    """By way of /proc/self: who connects has none of them."""
    near, far = socket.socketpair()
    with near, far, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_sock_dir / "x"))
        listener.listen()
        for sock in (near, listener):
            high = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 100)
            try:
                assert refusal(DIALER, f"/proc/self/fd/{high}").endswith(": No such file or directory")
            finally:
                os.close(high)
        assert is_silent(listener)


# Not there yet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["nothing", "stale"])
@pytest.mark.parametrize("member", ["ctl", "io"])
def test_socket_that_is_not_there_yet_is_looked_for_again(
    listener: socket.socket, tmp_sock_dir: Path, state: str, member: str
) -> None:
    path, there = tmp_sock_dir / "late", str(path_of(listener))
    if state == "stale":
        with socket.socket(socket.AF_UNIX) as before:
            before.bind(str(path))
    with socket.socket(socket.AF_UNIX) as late:

        def listen() -> bool:
            if not late.getsockname():
                path.unlink(missing_ok=True)
                late.bind(str(path))
                late.listen()
            return True

        hello = Hello("vm", str(path), there) if member == "ctl" else Hello("vm", there, str(path))
        with DIALER.connect(hello, WAIT, still_wanted=listen) as connected:
            assert getattr(connected, member).getpeername() == str(path)


@pytest.mark.parametrize("member", ["ctl", "io"])
def test_what_is_no_socket_is_not_waited_for(
    listener: socket.socket, tmp_sock_dir: Path, member: str
) -> None:
    path, there = tmp_sock_dir / "file", str(path_of(listener))
    path.touch()
    hello = Hello("vm", str(path), there) if member == "ctl" else Hello("vm", there, str(path))
    with pytest.raises(
        CannotConnect, match=f"^{member}Serial: cannot connect to {path}: it is not a socket$"
    ):
        DIALER.connect(hello, NEVER)


def test_nobody_waits_for_what_nobody_wants() -> None:
    why = "No such file or directory, and nobody waits for it any more"
    with pytest.raises(CannotConnect, match=f"^ctlSerial: cannot connect to /nowhere: {why}$"):
        DIALER.connect(Hello("vm", "/nowhere", "/nowhere"), WAIT, still_wanted=lambda: False)


def test_console_is_dialled_in_the_same_step_and_not_looked_for_again(listener: socket.socket) -> None:
    path = str(path_of(listener))
    with DIALER.connect(Hello("vm", path, path, path), WAIT) as connected:
        assert connected.console
        assert connected.console.getpeername() == path
    with DIALER.connect(Hello("vm", path, path), WAIT) as connected:
        assert connected.console is None
    never = mock.Mock(return_value=True)
    hello = Hello("vm", path, path, "/nowhere")
    with DIALER.connect(hello, WAIT, still_wanted=never) as connected:
        assert connected.console_error == "console: cannot connect to /nowhere: No such file or directory"
    assert not never.called


# The daemon itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["name", "symbolic link", "hard link", "..", "/proc"])
def test_the_daemon_is_not_connected_to_by_whatever_name(tmp_sock_dir: Path, way: str) -> None:
    own, other = tmp_sock_dir / "own", tmp_sock_dir / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(own))
        listener.listen()
        path = str(own)
        if way == "symbolic link":
            other.symlink_to(own)
            path = str(other)
        elif way == "hard link":
            os.link(own, other)
            path = str(other)
        elif way == "..":
            path = f"{tmp_sock_dir}/../{tmp_sock_dir.name}//own"
        elif way == "/proc":
            path = f"/proc/self/root{own}"
        dialer = dialer_of(Credentials.own(), listener.getsockname())
        assert refusal(dialer, path) == f"ctlSerial: cannot connect to {path}: that is the daemon itself"
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b""


# Other users ----------------------------------------------------------------------------------------------


@needs_root
def test_the_vm_sees_the_client(listener: socket.socket) -> None:
    path = path_of(listener)
    path.chmod(0o777)
    with connect(dialer_of(BOB), path), listener.accept()[0] as accepted:
        peer = Credentials.of_peer(accepted)
    assert (peer.uid, peer.gid, peer.groups) == (BOB.uid, BOB.gid, BOB.groups)
    assert peer.pid != os.getpid()


@needs_root
def test_a_user_may_be_in_as_many_groups_as_there_can_be(listener: socket.socket) -> None:
    path = path_of(listener)
    path.chmod(0o777)
    crowd = dataclasses.replace(BOB, groups=tuple(range(1_000_000, 1_065_536)))
    with connect(dialer_of(crowd), path), listener.accept()[0] as accepted:
        assert Credentials.of_peer(accepted).groups == crowd.groups


@needs_root
@pytest.mark.parametrize(
    ("user", "mode", "opens"),
    [
        (ALICE, 0o600, True),
        (ALICE, 0o066, False),
        (BOB, 0o660, True),  # of her group
        (BOB, 0o606, False),
        (BOB, 0o600, False),
        (ROOT, 0o000, True),
    ],
)
def test_permissions_are_those_of_the_client(
    listener: socket.socket, user: Credentials, mode: int, opens: bool
) -> None:
    path = path_of(listener)
    give(path, ALICE, mode)
    if opens:
        with connect(dialer_of(user), path):
            pass
    else:
        assert refusal(dialer_of(user), path) == f"ctlSerial: cannot connect to {path}: Permission denied"
        assert is_silent(listener)


@needs_root
@pytest.mark.parametrize("way", ["directly", "symbolic link", "..", "/proc", "another process"])
def test_directory_that_the_client_cannot_enter(listener: socket.socket, open_dir: Path, way: str) -> None:
    """Whatever path leads through it; the socket itself would be open to all."""
    path = path_of(listener)
    path.chmod(0o777)
    give(path.parent, ALICE)
    bobs = open_dir / "bob"
    bobs.mkdir()
    (bobs / "vm").symlink_to(path.parent)
    ways: dict[str, Path | str] = {
        "directly": path,
        "symbolic link": bobs / "vm" / "ctl",
        "..": f"{bobs}/../vm/ctl",
        "/proc": f"/proc/self/root{path}",
        "another process": f"/proc/1/root{path}",
    }
    assert refusal(dialer_of(BOB), ways[way]).endswith(": Permission denied")
    assert is_silent(listener)
    with connect(dialer_of(ALICE), path):
        pass


@needs_root
def test_link_in_a_sticky_directory_is_followed_for_its_owner_only(
    listener: socket.socket, open_dir: Path
) -> None:
    """If this host protects such links (/proc/sys/fs/protected_symlinks)."""
    if Path("/proc/sys/fs/protected_symlinks").read_text().strip() != "1":
        pytest.skip("this host follows them")
    path = path_of(listener)
    path.chmod(0o777)
    sticky = open_dir / "tmp"
    sticky.mkdir()
    sticky.chmod(0o1777)
    link = sticky / "link"
    link.symlink_to(path)
    os.chown(link, BOB.uid, BOB.gid, follow_symlinks=False)
    assert refusal(dialer_of(ALICE), link).endswith(": Permission denied")
    with connect(dialer_of(BOB), link):
        pass
