"""How the daemon starts, what it leaves alone, and how it stops."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.wire.daemon import HASTY, Daemon, Wire, own_daemon, run_to_end, start, write_config
from tests.wire.support import ACK, OK, WAIT, Stream, error_of, frame, is_silent, refused, request, wait_until


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def assert_gives_up(directory: Path, path: Path | str) -> str:
    """A daemon for that socket path ends with an error that names it."""
    result = run_to_end(["--socket-path", path])
    assert result.returncode not in {0, -6, -9, -11}
    assert "Traceback" not in result.stderr
    assert str(path)[:50] in result.stderr + result.stdout
    return result.stderr


# Starting ---


def test_socket_path_option(tmp_sock_dir: Path) -> None:
    path = tmp_sock_dir / "other.sock"
    with Daemon(tmp_sock_dir, ["--socket-path", path], socket_path=path) as daemon:
        assert daemon.stop() == 0
    assert not path.exists()


def test_socket_path_option_counts_more_than_the_file(tmp_sock_dir: Path) -> None:
    config = write_config(tmp_sock_dir, tmp_sock_dir / "file.sock")
    path = tmp_sock_dir / "option.sock"
    with Daemon(tmp_sock_dir, ["--config", config, "--socket-path", path], socket_path=path):
        assert not (tmp_sock_dir / "file.sock").exists()


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_directory_is_made_with_0750_and_the_socket_with_0660(tmp_sock_dir: Path, mask: int) -> None:
    path = tmp_sock_dir / "made" / "proxy.sock"
    config = write_config(tmp_sock_dir, path)
    (tmp_sock_dir / "log").touch()
    with umask(mask), Daemon(tmp_sock_dir, ["--config", config], socket_path=path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_directory_that_is_there_is_left_as_it_is(tmp_sock_dir: Path) -> None:
    directory = tmp_sock_dir / "there"
    directory.mkdir()
    directory.chmod(0o711)
    path = directory / "proxy.sock"
    with Daemon(tmp_sock_dir, ["--socket-path", path], socket_path=path):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o711


def test_stale_socket_is_replaced(tmp_sock_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_sock_dir / "proxy.sock"))
    with own_daemon(tmp_sock_dir) as wire:
        assert wire.pod().pings()


def test_socket_of_a_daemon_that_was_killed_is_replaced(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        wire.daemon.kill()
    assert (tmp_sock_dir / "proxy.sock").is_socket()
    with own_daemon(tmp_sock_dir) as wire:
        assert wire.pod().pings()


def test_second_daemon_leaves_the_socket_of_a_living_one_alone(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        inode = wire.daemon.socket_path.stat().st_ino
        pod = wire.pod()
        assert_gives_up(tmp_sock_dir, wire.daemon.socket_path)
        assert wire.daemon.socket_path.stat().st_ino == inode
        assert pod.pings(wire.attached(pod))
        wire.close()
        wire.daemon.check()


def test_socket_whose_server_does_not_accept_right_now_is_left_alone(tmp_sock_dir: Path) -> None:
    path = tmp_sock_dir / "busy.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))  # the backlog is full
        assert_gives_up(tmp_sock_dir, path)
        assert path.is_socket()


def test_datagram_socket_in_use_is_left_alone(tmp_sock_dir: Path) -> None:
    path = tmp_sock_dir / "datagram.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        assert_gives_up(tmp_sock_dir, path)
        assert path.is_socket()


def test_regular_file_is_left_alone(tmp_sock_dir: Path) -> None:
    path = tmp_sock_dir / "precious"
    path.write_text("data")
    assert_gives_up(tmp_sock_dir, path)
    assert path.read_text() == "data"


def test_empty_file_directory_fifo_and_link_are_left_alone(tmp_sock_dir: Path) -> None:
    paths = [tmp_sock_dir / name for name in ("empty", "directory", "fifo", "link")]
    paths[0].touch()
    paths[1].mkdir()
    os.mkfifo(paths[2])
    paths[3].symlink_to("nowhere")
    kinds = [path.lstat().st_mode for path in paths]
    for path in paths:
        assert_gives_up(tmp_sock_dir, path)
    assert [path.lstat().st_mode for path in paths] == kinds
    assert not (tmp_sock_dir / "nowhere").exists()


@pytest.mark.parametrize("size", [108, 4_000])
def test_path_over_107_bytes_is_an_error(tmp_sock_dir: Path, size: int) -> None:
    path = f"{tmp_sock_dir}/" + "x" * (size - len(str(tmp_sock_dir)) - 1)
    assert_gives_up(tmp_sock_dir, path)
    assert list(tmp_sock_dir.iterdir()) == []


def test_path_of_107_bytes_is_fine(tmp_sock_dir: Path) -> None:
    directory = tmp_sock_dir / ("d" * 50)
    path = directory / ("x" * (106 - len(str(directory))))
    assert len(str(path)) == 107
    with Daemon(tmp_sock_dir, ["--socket-path", path], socket_path=path) as daemon:
        assert daemon.stop() == 0
    assert not path.exists()


def test_directory_that_cannot_be_made_is_an_error(tmp_sock_dir: Path) -> None:
    (tmp_sock_dir / "file").touch()
    assert_gives_up(tmp_sock_dir, tmp_sock_dir / "file" / "proxy.sock")


def test_settings_that_are_not_right_are_an_error_that_names_file_and_key(tmp_sock_dir: Path) -> None:
    for tables, key in [
        ("[vm]\nready_timout = 1\n", "ready_timout"),
        ('[vm]\nbye_linger = "x"\n', "bye_linger"),
    ]:
        config = write_config(tmp_sock_dir, tmp_sock_dir / "proxy.sock", tables)
        result = run_to_end(["--config", config])
        assert result.returncode != 0
        assert key in result.stderr
        assert str(config) in result.stderr
        assert "Traceback" not in result.stderr


# Serving ---


def test_socket_that_vanishes_is_made_again_and_everything_goes_on(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pod = wire.pod()
        stream = pod.client.allocate()
        wire.daemon.socket_path.unlink()
        wait_until(lambda: "file had vanished: it was made again" in wire.daemon.log(), "it is made again")
        assert pod.pings(wire.attached(pod))
        assert pod.pings()
        pod.vm.send_frame(1, b"output")
        assert stream.read_frame() == (1, b"output")
        assert wire.daemon.stop() == 0
        assert not wire.daemon.socket_path.exists()


# Stopping ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_status_0_and_removes_its_socket(
    tmp_sock_dir: Path, number: signal.Signals
) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        assert wire.daemon.stop(number) == 0
        assert not wire.daemon.socket_path.exists()
        wire.daemon.check_log()


def test_signal_as_soon_as_the_socket_is_there_removes_it_too(tmp_sock_dir: Path) -> None:
    path = tmp_sock_dir / "proxy.sock"
    config = write_config(tmp_sock_dir, path)
    for _ in range(5):
        process = start(["--config", config], tmp_sock_dir / "log")
        try:
            while not path.exists():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) == 0
        finally:
            process.kill()
            process.wait()
        assert not path.exists()


def test_clients_streams_and_vms_do_not_delay_the_end_and_see_it(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pods = [wire.pod() for _ in range(3)]
        streams: list[Stream] = [pod.open() for pod in pods]
        idle = [wire.client() for _ in range(20)]
        for client in idle:
            assert client.ask("x")
        half = wire.client()
        half.send(request("x")[:5])
        for pod, stream in zip(pods, streams, strict=True):
            pod.vm.io.sendall(frame(1, b"out") + frame(2, b"err"))
            assert stream.read_frame() == (1, b"out")
        assert wire.daemon.stop() == 0
        for client in idle:
            assert client.sock.recv(1) == b""
        for pod, stream in zip(pods, streams, strict=True):
            assert stream.read_frame() == (2, b"err")
            assert stream.at_end()
            assert pod.vm.is_hung_up()
        wire.daemon.check_log()


def refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return True
    return False


def terminated(wire: Wire) -> None:
    """SIGTERM, and until it has been noticed."""
    wire.daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: refuses(wire.daemon.socket_path), "no more connections are accepted", 2)


def test_what_is_in_flight_may_finish(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pod = wire.pod()
        pod.client.hyper("ping")
        pod.vm.read_command()
        terminated(wire)
        assert is_silent(pod.client.sock)
        pod.vm.say(ACK)
        assert pod.client.receive() == OK
        assert wire.daemon.process.wait(4) == 0
        assert not wire.daemon.socket_path.exists()
        wire.daemon.check_log()


def test_hello_that_waits_for_its_sockets_is_told_that_the_daemon_stops(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        client, vm = wire.client(), wire.vm()
        vm.io_path.unlink()
        client.hello("pod", vm)
        with vm.listeners[0].accept()[0]:  # it waits for the other one now
            wire.daemon.process.send_signal(signal.SIGTERM)
            assert error_of(client.receive()) == "the daemon stops"
        assert wire.daemon.process.wait(WAIT) == 0


def test_nobody_else_is_let_in_meanwhile(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pod = wire.pod()
        pod.client.hyper("ping")
        pod.vm.read_command()
        terminated(wire)
        assert is_silent(pod.client.sock)
        pod.vm.say(ACK)
        assert pod.client.receive() == OK
        assert wire.daemon.process.wait(4) == 0


def test_requests_that_had_arrived_are_answered(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        client = wire.client()
        client.send(request("x") * 200)
        assert client.receive() == refused("no payload named 'x'")
        assert wire.daemon.stop() == 0


def test_hello_in_flight_does_not_delay_the_end_for_long(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir, HASTY) as wire:
        client, vm = wire.client(), wire.vm()
        client.hello("a", vm)
        vm.accept()
        assert wire.daemon.stop() == 0


def test_who_still_waits_for_a_vm_at_the_end_is_told_why(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pod, asker, late = wire.pod(), wire.client(), wire.vm()
        pod.client.hyper("ping")
        pod.vm.read_command()
        asker.hello("late", late)
        late.accept()
        assert wire.daemon.stop() == 0
        assert pod.client.receive() == refused("VM gone: the daemon stops")
        assert asker.receive() == refused("the daemon stops")


def test_commands_without_an_answer_and_clients_that_do_not_read_delay_the_end_by_5_seconds_at_most(
    tmp_sock_dir: Path,
) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        pod = wire.pod()
        stream = pod.open()
        pod.vm.io.sendall(frame(1, b"x" * 10_000) * 100)
        assert pod.pings()
        pod.client.hyper("destroypod")
        pod.vm.read_command()
        wire.daemon.process.send_signal(signal.SIGTERM)
        assert wire.daemon.process.wait(7) == 0
        assert not wire.daemon.socket_path.exists()
        assert stream.read_frame() == (1, b"x" * 10_000)
        wire.daemon.check_log()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_does_no_harm(tmp_sock_dir: Path, second: signal.Signals) -> None:
    """Whether it cuts the wait short is open."""
    with own_daemon(tmp_sock_dir) as wire:
        pod = wire.pod()
        pod.client.hyper("ping")
        pod.vm.read_command()
        terminated(wire)
        wire.daemon.process.send_signal(second)
        with suppress(BrokenPipeError):
            pod.vm.say(ACK)
        assert wire.daemon.process.wait(4) == 0
        assert not wire.daemon.socket_path.exists()
        wire.daemon.check_log()


def test_socket_that_somebody_put_in_its_place_is_not_removed(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir) as wire:
        path = wire.daemon.socket_path
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(f"{path}2")
            os.replace(f"{path}2", path)  # a file that is missing would be made again
            assert wire.daemon.stop() == 0
        assert path.is_socket()


def test_error_of_a_command_that_the_end_cut_off_is_an_error(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir, HASTY) as wire:
        pod = wire.pod()
        pod.client.hyper("destroypod")
        pod.vm.read_command()
        wire.daemon.process.send_signal(signal.SIGTERM)
        error_of(pod.client.receive())  # its own deadline is shorter
        assert wire.daemon.process.wait(7) == 0
