"""The daemon's place in the file system, and who else may be there."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.linux import socketfile
from cc_proxy.linux.fds import may_hold_fds
from cc_proxy.proxy.clients.listener import Listener, ListenError
from tests.proxy.conftest import Logged
from tests.proxy.support import open_fds
from tests.shortages import small_disk
from tests.wire.support import WAIT, in_background, wait_until


def close(listener: Listener) -> None:
    listener.socket.close()
    listener.remove()


@pytest.fixture
def path(tmp_sock_dir: Path) -> Path:
    return tmp_sock_dir / "proxy.sock"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_modes_whatever_the_umask(tmp_sock_dir: Path, mask: int) -> None:
    path = tmp_sock_dir / "parent" / "made" / "proxy.sock"
    before = os.umask(mask)
    try:
        listener = Listener.bind(str(path))
        assert os.umask(mask) == mask, "the umask is as it was"
    finally:
        os.umask(before)
    assert (mode_of(path.parent), mode_of(path)) == (0o750, 0o660)
    assert mode_of(path.parent.parent) == 0o755, "or the group would not get as far as the directory"
    assert listener.own
    assert not os.get_inheritable(listener.socket.fileno())
    close(listener)
    assert not path.exists()


def test_directory_that_is_there_stays_as_it_is(path: Path) -> None:
    path.parent.chmod(0o711)
    close(Listener.bind(str(path)))
    assert mode_of(path.parent) == 0o711


def test_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = Listener.bind(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close(listener)


@pytest.mark.parametrize("backlog", [0, 10])
def test_socket_that_is_served_is_left_alone(path: Path, backlog: int) -> None:
    with socket.socket(socket.AF_UNIX) as living, ExitStack() as stack:
        living.bind(str(path))
        living.listen(backlog)
        if not backlog:  # nobody else can connect
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
        before = set(open_fds())
        with pytest.raises(ListenError, match="another process serves this socket; it was left alone"):
            Listener.bind(str(path))
        assert set(open_fds()) == before
    assert path.exists()


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    before = set(open_fds())
    with pytest.raises(ListenError, match="not a socket; it was left alone"):
        Listener.bind(str(path))
    assert path.read_text() == "precious"
    assert set(open_fds()) == before


def test_link_to_a_stale_socket_is_left_alone(path: Path) -> None:
    target = path.with_name("target")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(target))
    path.symlink_to(target)
    with pytest.raises(ListenError, match="not a socket"):
        Listener.bind(str(path))
    assert path.is_symlink()
    assert target.exists()


@pytest.mark.parametrize("name", ["", "x" * 200, "é" * 60])
def test_path_that_is_too_long(tmp_sock_dir: Path, name: str) -> None:
    path = str(tmp_sock_dir / name)
    if name == "":
        path += "/" + "x" * (107 - len(path))
    size = len(os.fsencode(path))
    with pytest.raises(ListenError, match=f"a path of {size} bytes, the limit is 107"):
        Listener.bind(path)


@pytest.mark.parametrize("size", [106, 107])
def test_path_of_just_the_right_length(tmp_sock_dir: Path, size: int) -> None:
    path = str(tmp_sock_dir) + "/"
    path += "x" * (size - len(path))
    close(Listener.bind(path))


@pytest.mark.parametrize(
    ("name", "cause"), [("file/proxy.sock", "File exists"), ("file/sub/proxy.sock", "Not a directory")]
)
def test_directory_that_cannot_be_made(tmp_sock_dir: Path, name: str, cause: str) -> None:
    (tmp_sock_dir / "file").touch()
    before = set(open_fds())
    with pytest.raises(ListenError, match=rf"proxy\.sock: cannot listen: {cause}"):
        Listener.bind(str(tmp_sock_dir / name))
    assert set(open_fds()) == before


def test_listening_that_fails_leaves_no_fd_and_no_umask(tmp_sock_dir: Path) -> None:
    before, mask = set(open_fds()), os.umask(0o022)
    full = small_disk(tmp_sock_dir, "nr_inodes=1")
    try:
        with full, pytest.raises(ListenError, match="No space left on device"):
            Listener.bind(str(tmp_sock_dir / "sock"))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    assert set(open_fds()) == before


def test_two_daemons_that_start_at_once_look_at_it_one_after_the_other(path: Path) -> None:
    """Or both would find it stale, and the second remove the first one's."""
    listeners: list[Listener] = []
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with in_background(lambda: listeners.append(Listener.bind(str(path)))):
            wait_until(lambda: waits_for_lock(path.parent), "it waits for its turn")
            assert not path.exists()
            fcntl.flock(directory, fcntl.LOCK_UN)
    finally:
        os.close(directory)
    with pytest.raises(ListenError, match="another process serves this socket"):
        Listener.bind(str(path))
    close(listeners[0])


def test_nobody_who_may_read_the_directory_keeps_the_daemon_from_starting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketfile, "_PATIENCE", 0.05)
    listeners: list[Listener] = []
    directory = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        starting = threading.Thread(target=lambda: listeners.append(Listener.bind(str(path))))
        starting.start()
        starting.join(WAIT / 2)
        assert listeners
    finally:
        os.close(directory)
        starting.join(WAIT)
        close(listeners[0])


def waits_for_lock(directory: Path) -> bool:
    """Whether a thread of this process has opened the directory a second time."""
    return list(open_fds().values()).count(str(directory)) == 2


@pytest.mark.parametrize("blocking", [True, False])
def test_no_socket_makes_who_accepts_wait(path: Path, blocking: bool) -> None:
    """However it was inherited."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        sock.setblocking(blocking)
        with pytest.raises(BlockingIOError):
            Listener(sock).socket.accept()


def test_socket_that_somebody_put_in_its_place_is_not_removed(path: Path) -> None:
    listener = Listener.bind(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        close(listener)
        assert path.exists()


def test_socket_that_is_gone_already_is_no_error(path: Path) -> None:
    listener = Listener.bind(str(path))
    path.unlink()
    close(listener)
    path.parent.rmdir()
    listener.remove()
    path.parent.mkdir()


def test_socket_of_somebody_else_is_never_removed(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.bind(str(path))
        listener = Listener(inherited)
        assert not listener.own
        listener.remove()
    assert path.exists()


def test_what_took_its_place_is_left_alone_though_it_looks_the_same(path: Path) -> None:
    """A file system may give a new file the number of one that has gone."""
    listener = Listener.bind(str(path))
    same = path.with_name("same")
    os.link(path, same)
    close(listener)
    assert not path.exists()
    same.rename(path)
    listener.remove()
    assert path.exists()


def test_socket_that_goes_while_it_is_looked_at_is_in_nobodys_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_later = Listener.bind(str(path))
    look = os.lstat

    def look_and_remove(at: str) -> os.stat_result:
        found = look(at)
        close(close_later)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", look_and_remove)
        patch.setattr(close_later, "remove", lambda: path.unlink(missing_ok=True))
        listener = Listener.bind(str(path))
    close(listener)


def test_who_may_connect_may_change(path: Path, logged: Logged) -> None:
    path.parent.chmod(0o755)
    listener = Listener.bind(str(path))
    for for_all, mode in ((True, 0o666), (True, 0o666), (False, 0o660)):
        listener.open_to(for_all=for_all)
        assert mode_of(path) == mode
    path.chmod(0o600)
    listener.open_to(for_all=False)
    assert mode_of(path) == 0o600, "nothing has changed in the settings"
    path.unlink()
    path.touch(0o600)
    listener.open_to(for_all=True)
    assert mode_of(path) == 0o600, "it is another file"
    path.unlink()
    listener.open_to(for_all=False)
    assert logged.fields("the socket's permissions cannot be changed") == [
        {"socket": str(path), "error": "No such file or directory"}
    ]
    close(listener)
    listener.open_to(for_all=True)


def test_permissions_of_an_inherited_socket_are_not_the_daemons(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen()
        listener = Listener(sock)
        listener.open_to(for_all=True)
        assert mode_of(path) == 0o600
        listener.remove()
    assert path.exists()


# A file that vanishes --------------------------------------------------------------------------------------


def test_own_socket_that_vanishes_is_made_again(path: Path, logged: Logged) -> None:
    path.parent.chmod(0o755)
    listener = Listener.bind(str(path), for_all=True)
    fd, fds, may_hold = listener.socket.fileno(), set(open_fds()), may_hold_fds(listener.socket)
    path.unlink()
    listener.look_after()
    listener.look_after()
    assert logged.fields("the socket's file had vanished: it was made again") == [{"socket": str(path)}]
    assert (listener.socket.fileno(), set(open_fds())) == (fd, fds)
    assert mode_of(path) == 0o666
    assert may_hold_fds(listener.socket) == may_hold
    with pytest.raises(BlockingIOError):
        listener.socket.accept()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        accepted, _ = listener.socket.accept()
        accepted.close()
    close(listener)
    assert not path.exists()


def test_own_socket_is_made_again_with_its_directory(path: Path) -> None:
    listener = Listener.bind(str(path.parent / "made" / "proxy.sock"))
    shutil.rmtree(path.parent / "made")
    listener.look_after()
    assert (mode_of(path.parent / "made"), mode_of(path.parent / "made" / "proxy.sock")) == (0o750, 0o660)
    close(listener)


def test_who_has_connected_already_is_accepted_first(path: Path) -> None:
    listener = Listener.bind(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        path.unlink()
        listener.look_after()
        assert not path.exists()
        accepted, _ = listener.socket.accept()
        with accepted:
            accepted.send(b"hello")
            listener.look_after()
            assert path.exists()
            assert client.recv(100) == b"hello"
    close(listener)


def test_what_lies_in_the_place_of_an_own_socket_is_left_alone(path: Path, logged: Logged) -> None:
    listener = Listener.bind(str(path))
    path.unlink()
    path.write_text("precious")
    for _ in range(3):
        listener.look_after()
    assert path.read_text() == "precious"
    error = "another file has taken the socket's place: remove that, and the socket is made again"
    assert logged.fields("nobody can connect") == [{"socket": str(path), "error": error}]
    path.unlink()
    listener.look_after()
    assert path.is_socket()
    close(listener)


def test_socket_that_cannot_be_made_again_is_said_once_and_tried_for_ever(path: Path, logged: Logged) -> None:
    made = path.parent / "made"
    listener = Listener.bind(str(made / "proxy.sock"))
    fds = set(open_fds())
    shutil.rmtree(made)
    made.touch()
    for _ in range(3):
        listener.look_after()
    (fields,) = logged.fields("nobody can connect")
    assert str(fields["error"]).startswith("the socket's file has vanished, and cannot be made again: ")
    assert set(open_fds()) == fds
    made.unlink()
    listener.look_after()
    assert (made / "proxy.sock").is_socket()
    close(listener)


def test_permissions_that_changed_while_the_file_was_gone_count_when_it_is_made_again(path: Path) -> None:
    path.parent.chmod(0o755)
    listener = Listener.bind(str(path))
    path.unlink()
    listener.open_to(for_all=True)
    listener.look_after()
    assert mode_of(path) == 0o666
    close(listener)


@pytest.mark.parametrize("replaced", [False, True])
def test_inherited_socket_that_vanishes_is_its_managers(path: Path, logged: Logged, replaced: bool) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        listener = Listener(sock)
        listener.look_after()
        assert logged.records == []
        path.unlink()
        if replaced:
            path.touch()
        for _ in range(3):
            listener.look_after()
        (fields,) = logged.fields("nobody can connect")
        assert "`systemctl restart cc-proxy.socket` makes it again" in str(fields["error"])
        assert path.exists() == replaced
        listener.remove()
        assert path.exists() == replaced


@pytest.mark.parametrize("name", ["", "\0ccp-abstract", "gone"])
def test_inherited_socket_that_is_not_seen_is_not_missed(path: Path, logged: Logged, name: str) -> None:
    """The manager may see other files than the daemon."""
    with socket.socket(socket.AF_UNIX) as sock:
        if name == "gone":
            sock.bind(str(path))
            path.unlink()
        elif name:
            sock.bind(name)
        Listener(sock).look_after()
    assert logged.records == []


# Directories -----------------------------------------------------------------------------------------------


def test_directory_that_keeps_out_who_may_connect_is_said(path: Path, logged: Logged) -> None:
    path.parent.chmod(0o750)
    close(Listener.bind(str(path), for_all=True))
    listener = Listener.bind(str(path))
    listener.open_to(for_all=True)
    close(listener)
    text = "[access] names others, but only its group can reach what is in the socket's directory"
    assert logged.fields(text) == [{"directory": str(path.parent), "mode": "0750"}] * 2
