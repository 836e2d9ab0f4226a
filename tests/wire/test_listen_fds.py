"""A socket inherited as systemd passes it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.wire.daemon import Daemon, Wire, write_config
from tests.wire.support import RawClient, refused, request, wait_until

# LISTEN_PID has to be the daemon's own, so it is set in the process that becomes the daemon.
ACTIVATE = """
import os, sys
fd, pid, *command = sys.argv[1:]
os.dup2(int(fd), 3)
if int(fd) != 3:
    os.close(int(fd))
os.environ["LISTEN_FDS"] = "1"
os.environ["LISTEN_PID"] = pid if pid != "own" else str(os.getpid())
os.execv(command[0], command)
"""


@pytest.fixture
def listener(tmp_sock_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_sock_dir / "inherited.sock"))
        listener.listen()
        yield listener


@contextmanager
def activated(
    directory: Path, listener: socket.socket, *, pid: str = "own", serves: str = "inherited.sock"
) -> Iterator[Wire]:
    """A daemon that is passed the listener, and whose settings say `own.sock`."""
    daemon = Daemon(
        directory,
        ["--config", write_config(directory, directory / "own.sock")],
        socket_path=directory / serves,
        prefix=[sys.executable, "-c", ACTIVATE, str(listener.fileno()), pid],
        pass_fds=[listener.fileno()],
    )
    with daemon:
        wire = Wire(daemon, directory)
        try:
            yield wire
        finally:
            wire.close()


def test_inherited_socket_is_served_and_no_other_is_made(tmp_sock_dir: Path, listener: socket.socket) -> None:
    with activated(tmp_sock_dir, listener) as wire:
        assert wire.pod().pings()
        assert not (tmp_sock_dir / "own.sock").exists()
        wire.close()
        wire.daemon.check()


def test_inherited_socket_is_never_unlinked(tmp_sock_dir: Path, listener: socket.socket) -> None:
    with activated(tmp_sock_dir, listener) as wire:
        inode = wire.daemon.socket_path.stat().st_ino
        assert wire.daemon.stop() == 0
        assert wire.daemon.socket_path.stat().st_ino == inode
        wire.daemon.check_log()


def test_clients_that_connect_while_no_daemon_is_there_are_served_by_the_next(
    tmp_sock_dir: Path, listener: socket.socket
) -> None:
    for name in ("first", "second"):
        early = RawClient(tmp_sock_dir / "inherited.sock")
        try:
            early.send(request(name))
            with activated(tmp_sock_dir, listener) as wire:
                assert early.receive() == refused(f"no payload named '{name}'")
                assert early.ask("later") == refused("no payload named 'later'")
                assert wire.daemon.stop() == 0
        finally:
            early.close()


def test_sockets_meant_for_another_process_are_not_touched(
    tmp_sock_dir: Path, listener: socket.socket
) -> None:
    with activated(tmp_sock_dir, listener, pid="1", serves="own.sock") as wire:
        assert wire.pod().pings()
        assert wire.daemon.stop() == 0
    assert not (tmp_sock_dir / "own.sock").exists()
    assert (tmp_sock_dir / "inherited.sock").is_socket()


def test_inherited_socket_that_vanishes_is_left_to_its_manager(
    tmp_sock_dir: Path, listener: socket.socket
) -> None:
    with activated(tmp_sock_dir, listener) as wire:
        pod = wire.pod()
        wire.daemon.socket_path.unlink()
        wait_until(
            lambda: "systemctl restart cc-proxy.socket" in wire.daemon.log(), "the log says what to do"
        )
        assert pod.pings()
        assert not wire.daemon.socket_path.exists()
        assert wire.daemon.stop() == 0
