"""One process of the daemon follows another, and neither clients nor VMs notice, wherever they stand."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.continuity.box import close_all
from cc_proxy.continuity.format import VERSION
from cc_proxy.linux.fds import identity_of
from tests.echoes import all_moved, echoes
from tests.wire.daemon import CHECKOUT, PATIENT, Daemon, ManagedDaemon, Pod, Wire, own_daemon, write_config
from tests.wire.support import (
    EXECCMD,
    MARKER,
    MIB,
    OK,
    READY,
    VERSIONED,
    FakeVm,
    at_end,
    frame,
    listen_at,
    refused,
    request,
    unread_by_peer,
    wait_until,
)

Start = Callable[[Path, str], Daemon]


@pytest.fixture(params=["started by the one before", "started by a manager"])
def kind(request: pytest.FixtureRequest) -> Start:
    """How the next process comes to be."""
    return Daemon.configured if "before" in request.param else ManagedDaemon


@pytest.fixture
def town(tmp_sock_dir: Path, kind: Start) -> Iterator[Wire]:
    """A daemon, its VMs and clients."""
    with own_daemon(tmp_sock_dir, start=kind, check=True) as wire:
        yield wire


def test_frames_that_are_on_their_way_arrive_once_and_whole(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    down, up = frame(stream.base, b"from the VM"), frame(stream.base, b"from the client")
    for cut in (1, 8, 11, 12, 15):
        pod.vm.io.sendall(down[:cut])
        stream.sock.sendall(up[:cut])
        town.daemon.replace()
        pod.vm.io.sendall(down[cut:])
        stream.sock.sendall(up[cut:])
        assert stream.read_frame().payload == b"from the VM"
        got = b""
        while len(got) < len(b"from the client"):
            got += pod.vm.read_frame().payload
        assert got == b"from the client"


def test_requests_and_responses_that_are_on_their_way(town: Wire) -> None:
    pod = town.pod()
    client = town.attached(pod)
    asked = request("allocateIO", {"nStreams": 1})
    client.send(asked[:9])
    town.daemon.replace()
    client.send(asked[9:] + asked)
    assert [client.receive_io().base, client.receive_io().base] == [1, 2]


def test_a_response_that_is_not_taken_and_the_fd_behind_it(town: Wire) -> None:
    """More than the client's socket takes: the rest of a response, or its fd, waits in the daemon."""
    client = town.attached(town.pod())
    for _ in range(310):
        client.send(request("x"))
    client.send(request("allocateIO", {"nStreams": 1}))
    town.daemon.replace()
    for _ in range(310):
        assert client.receive() == refused("no payload named 'x'")
    assert client.receive_io().base == 1


def test_commands_that_are_not_answered_yet_get_their_own_answers(town: Wire) -> None:
    pod = town.pod()
    clients = [pod.client, town.attached(pod), town.attached(pod)]
    clients[0].hyper("ping", '"0"')
    assert pod.vm.read_command().payload == b'"0"'
    for number, client in enumerate(clients[1:], 1):
        client.hyper("ping", f'"{number}"')
        wait_until(functools.partial(_waits, town, number + 1), "it waits")
    town.daemon.replace()
    pod.vm.say(9)
    assert clients[0].receive() == OK
    for number in (1, 2):
        assert pod.vm.read_command().payload == b'"%d"' % number
        town.daemon.replace()
        pod.vm.say(*((9,), (10,))[number - 1])
        said = clients[number].receive()
        assert said == (OK if number == 1 else refused("ERROR received from Hyperstart"))


def _waits(town: Wire, commands: int) -> bool:
    client = town.daemon.connect()
    try:
        vms = json.loads(client.ask("status"))["data"]["vms"]
    finally:
        client.close()
    return sum(int(vm["waitingCommands"]) for vm in vms) == commands


def test_a_process_whose_start_is_acknowledged_later_gets_its_stdin(town: Wire) -> None:
    pod = town.pod()
    stream = pod.client.allocate(1)
    stream.send(b"early")
    pod.client.hyper("execcmd", json.dumps({"process": {"stdio": stream.base}}))
    assert pod.vm.read_command().code == EXECCMD
    town.daemon.replace()
    pod.vm.say(9)
    assert pod.client.receive() == OK
    assert pod.vm.read_frame().payload == b"early"


def test_a_vm_that_did_not_power_off_when_it_was_told_to(town: Wire) -> None:
    pod = town.pod()
    pod.client.hyper("destroypod", "{}")
    pod.vm.read_command()
    town.daemon.replace()
    pod.vm.say(10)
    assert pod.client.receive() == refused("ERROR received from Hyperstart")
    pod.vm.hang_up()
    town.wait_unregistered(pod.container)
    wait_until(lambda: '"VM lost"' in town.daemon.log(), "the log says so")


def test_a_hello_that_waits_for_ready(town: Wire) -> None:
    client, vm = town.client(), town.vm()
    client.hello("slow", vm)
    vm.accept()
    vm.ctl.sendall(bytes([0, 0, 0, 8, 0]))
    wait_until(lambda: town.is_taken("slow"), "it is connected")
    for _ in range(2):
        town.daemon.replace()
        assert town.is_taken("slow")
    vm.ctl.sendall(bytes([0, 0, 8]))
    assert client.receive() == VERSIONED
    assert client.allocate(1).base == 1


def test_a_hello_whose_vm_is_not_there_yet(town: Wire) -> None:
    client, vm = town.client(), town.vm()
    for listener in vm.listeners:
        listener.close()
    vm.ctl_path.unlink()
    vm.io_path.unlink()
    client.hello("late", vm)
    wait_until(lambda: town.is_taken("late"), "it is looked for")
    town.daemon.replace()
    vm.listen_again()
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED


def test_a_hello_that_has_reached_one_of_its_sockets(town: Wire) -> None:
    client, vm = town.client(), town.vm()
    vm.listeners[1].close()
    vm.io_path.unlink()
    client.hello("half", vm)
    reached, _ = vm.listeners[0].accept()
    with reached:
        town.daemon.replace()
        assert at_end(reached)
    vm.listeners[1] = listen_at(vm.io_path)
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED


def test_a_vm_with_a_socket_whose_name_is_no_text(town: Wire) -> None:
    client, vm = town.client(), FakeVm(town.directory, "\udcff")
    names = [town.directory / "ctl", town.directory / "io"]
    for name, path in zip(names, (vm.ctl_path, vm.io_path), strict=True):
        name.symlink_to(path)
    ctl, io = map(str, names)
    client.send(request("hello", {"containerId": "odd", "ctlSerial": ctl, "ioSerial": io}))
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    town.daemon.replace()
    assert client.allocate(1).base == 1
    vm.close()


def test_output_that_waits_for_its_client(town: Wire) -> None:
    """More than the socket takes: it is in the spool, and some in memory."""
    pod = town.pod()
    stream = pod.open()
    payload = os.urandom(10_000)
    for _ in range(400):
        pod.vm.io.sendall(frame(stream.base, payload))
    for _ in range(2):
        town.daemon.replace()
        assert stream.read_frame().payload == payload
    for _ in range(398):
        assert stream.read_frame().payload == payload
    wait_until(lambda: not json.loads(pod.client.ask("status"))["data"]["spooled"], "the spool is empty")


def test_stdin_that_waits_for_its_process(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    stream.send(bytes(2_000))
    got = len(pod.vm.read_frame().payload)
    marker = pod.vm.read_frame().seq
    while got < 2_000:
        assert marker >= MARKER
        town.daemon.replace()
        pod.vm.io.sendall(frame(marker))
        got += len(pod.vm.read_frame().payload)
        if got < 2_000 or got % 512:
            marker = pod.vm.read_frame().seq
    assert got == 2_000


def test_a_client_that_sends_no_more(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    stream.send(b"last")
    stream.sock.shutdown(socket.SHUT_WR)
    assert [pod.vm.read_frame().payload for _ in range(2)] == [b"last", b""]
    town.daemon.replace()
    pod.vm.io.sendall(frame(stream.base, b"answer"))
    assert stream.read_frame().payload == b"answer"


def test_a_vm_that_has_gone_keeps_its_id_and_what_its_clients_have_not_read(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    payload = bytes(10_000)
    for _ in range(400):
        pod.vm.io.sendall(frame(stream.base, payload))
    pod.vm.io.close()
    wait_until(lambda: not town.is_registered(pod.container), "it is lost")
    town.daemon.replace()
    for _ in range(400):
        assert stream.read_frame().payload == payload
    assert stream.at_end()
    assert pod.client.attach(pod.container) == VERSIONED
    town.daemon.replace()
    assert pod.client.bye(pod.container) == OK


def test_what_dies_meanwhile_is_noticed(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        first, second = wire.pod(), wire.pod()
        stream = second.open()
        daemon.leave_all()
        first.vm.ctl.close()
        first.vm.io.close()
        stream.close()
        first.client.close()
        daemon.start_again()
        wait_until(lambda: not wire.is_registered(first.container), "the VM is lost")
        assert second.pings()
        wait_until(lambda: not _sessions(wire), "the session is closed")
        wire.close()
        daemon.check()


def _sessions(town: Wire) -> int:
    client = town.daemon.connect()
    try:
        vms = json.loads(client.ask("status"))["data"]["vms"]
        return sum(vm["streams"]["sessions"] for vm in vms if vm["streams"])
    finally:
        client.close()


def _status(pod: Pod) -> Any:
    return json.loads(pod.client.ask("status"))["data"]


def test_what_is_counted_and_set_stays(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    pod.vm.io.sendall(frame(99, b"nobody's") + frame(stream.base, b"out"))
    stream.send(b"in")
    assert (stream.read_frame().payload, pod.vm.read_frame().payload) == (b"out", b"in")
    assert pod.client.ask("logLevel", {"level": "debug"})
    before = _status(pod)
    town.daemon.replace()
    wait_until(lambda: _status(pod)["users"] == before["users"], "those who looked have left")
    after = _status(pod)
    assert before["replaced"] == {"restarts": 0, "crashes": 0, "last": ""}
    assert after["replaced"] == {"restarts": 1, "crashes": 0, "last": "restart"}
    assert after["knownFor"] - after["uptime"] > before["knownFor"]
    for name in ("logLevel", "users", "connections"):
        assert after[name] == before[name]
    assert after["vms"][0]["age"] > before["vms"][0]["age"]
    traffic = after["vms"][0]["streams"]["traffic"]
    assert traffic == before["vms"][0]["streams"]["traffic"]
    assert (traffic["framesToClients"], traffic["framesToVm"], traffic["strayFrames"]) == (1, 1, 1)
    stream.send(b"more")
    assert pod.vm.read_frame().payload == b"more"
    assert _status(pod)["vms"][0]["streams"]["traffic"]["framesToVm"] == 2


def test_a_socket_stays_where_it_is_whatever_the_settings_say_by_then(town: Wire) -> None:
    elsewhere = town.directory / "elsewhere.sock"
    write_config(town.directory, elsewhere)
    town.daemon.replace()
    assert not elsewhere.exists()
    said = '"settings that take effect after a stop and a start"'
    wait_until(lambda: said in town.daemon.log(), "the log says so")


@pytest.mark.parametrize(("before", "after", "mode"), [("", "*", 0o666), ("*", "", 0o660)])
def test_who_may_connect_is_what_the_settings_say_by_then(
    town: Wire, before: str, after: str, mode: int
) -> None:
    for users in (before, after):
        names = json.dumps([users] if users else [])
        write_config(town.directory, town.daemon.socket_path, f"{PATIENT}[access]\nusers = {names}\n")
        town.daemon.replace()
    assert stat.S_IMODE(town.daemon.socket_path.stat().st_mode) == mode


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_byte_arrives_through_many_replacements(town: Wire, times: int) -> None:
    pods = [town.pod() for _ in range(3)]
    with echoes(pods, each=4) as streams:
        for _ in range(times):
            town.daemon.replace()
            before = [stream.sent for stream in streams]
            wait_until(functools.partial(all_moved, streams, before), "bytes go on in all of them")
    assert all(pod.pings() for pod in pods)
    assert _status(pods[0])["replaced"]["restarts"] == times


# Bad luck -------------------------------------------------------------------------------------------------


def test_a_successor_with_wrong_settings_leaves_the_old_one_serving(tmp_sock_dir: Path) -> None:
    with Daemon.configured(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        stream = pod.open()
        (tmp_sock_dir / "cc-proxy.toml").write_text("[nonsense]\n")
        daemon.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: "not replaced: this process goes on" in daemon.log(), "it says so")
        pod.vm.io.sendall(frame(stream.base, b"on"))
        assert stream.read_frame().payload == b"on"
        assert pod.pings()
        assert daemon.socket_path.exists()
        write_config(tmp_sock_dir, daemon.socket_path)
        daemon.replace()
        assert pod.pings()
        wire.close()


def test_a_state_that_cannot_be_written_stays_where_it_is(town: Wire) -> None:
    daemon, pod = town.daemon, town.pod()
    stream, client = pod.open(), town.attached(pod)
    asked = request("x" * (MIB - 100))
    client.send(asked[:-1])
    wait_until(lambda: not unread_by_peer(client.sock), "it is read")
    children = _children(daemon)
    with _limited(daemon, resource.RLIMIT_FSIZE, MIB // 2):
        daemon.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: '"ready"' in daemon.log().partition("this process goes on")[2], "it goes on")
    wait_until(lambda: "File too large" in daemon.log(), "the log says so")
    assert _children(daemon) == children
    client.send(asked[-1:])
    assert b"no payload named" in client.receive()
    pod.vm.io.sendall(frame(stream.base, b"on"))
    assert stream.read_frame().payload == b"on"
    daemon.replace()
    assert pod.pings()


def test_no_process_can_be_started(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir, check=True) as town:
        pod = town.pod()
        with _limited(town.daemon, resource.RLIMIT_NOFILE, town.daemon.count_fds()):
            town.daemon.process.send_signal(signal.SIGUSR2)
            wait_until(lambda: "it cannot be started: " in town.daemon.log(), "it says so")
        assert pod.pings()


@contextmanager
def _limited(daemon: Daemon, which: int, limit: int) -> Iterator[None]:
    soft, hard = resource.prlimit(daemon.pid, which)
    resource.prlimit(daemon.pid, which, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, which, (soft, hard))


def _children(daemon: Daemon) -> str:
    return Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()


def test_settings_to_be_read_again_are_read_by_the_next_process(tmp_sock_dir: Path) -> None:
    with own_daemon(tmp_sock_dir, check=True) as town:
        daemon, alone = town.daemon, _children(town.daemon)
        with daemon.being_replaced():
            daemon.process.send_signal(signal.SIGUSR2)
            wait_until(lambda: _children(daemon) != alone, "the next process is started")
            daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "settings reloaded" in daemon.log(), "they are read")


def test_a_directory_that_has_gone(tmp_sock_dir: Path) -> None:
    nowhere = tmp_sock_dir / "nowhere"
    nowhere.mkdir()
    leave = f'cd {nowhere} && rmdir {nowhere} && PYTHONPATH={CHECKOUT} exec "$@"'
    prefix = ["sh", "-c", leave, "sh"]
    with own_daemon(tmp_sock_dir, prefix=prefix, check=True) as town:
        town.daemon.replace()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a PID namespace")
def test_the_first_process_of_a_pid_namespace_cannot_be_replaced(tmp_sock_dir: Path) -> None:
    prefix = ["unshare", "--pid", "--fork", "--kill-child=KILL"]
    with Daemon.configured(tmp_sock_dir, prefix=prefix) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        os.kill(int(_children(daemon)), signal.SIGUSR2)
        wait_until(lambda: "it is process 1" in daemon.log(), "it says so")
        assert pod.pings()
        wire.close()


def test_a_manager_that_keeps_too_little(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir, most_fds=1) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        wait_until(lambda: "a restart of cc-proxy ends all VMs" in daemon.log(), "the log says so")
        pod = wire.pod()
        daemon.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: "not replaced: this process goes on" in daemon.log(), "it says so")
        assert pod.pings()
        wire.close()


@pytest.mark.parametrize("most", [0, 1])
def test_a_manager_that_keeps_too_little_can_start_the_daemon_again(tmp_sock_dir: Path, most: int) -> None:
    with ManagedDaemon(tmp_sock_dir, most_fds=most) as daemon:
        assert not daemon.stop()
        daemon.start_again()
        daemon.check()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_another_version_has_stored_is_let_go(tmp_sock_dir: Path, at: int) -> None:
    ours, theirs = socket.socketpair()
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        daemon.leave_all()
        daemon.manager.fds.insert(at, ("cc-proxy-something", theirs.detach()))
        daemon.start_again()
        assert pod.pings()
        assert at_end(ours)
        wire.close()
        daemon.check()
    ours.close()


def test_a_manager_that_drops_everything_meanwhile_costs_what_it_drops(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        stream = pod.open()
        daemon.leave_all()
        daemon.manager.drop()
        assert stream.at_end()
        assert at_end(pod.vm.io)
        assert at_end(pod.client.sock)
        daemon.start_again()
        assert wire.pod().pings()
        wire.close()


def test_a_manager_that_drops_a_part_of_it_meanwhile(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        daemon.leave_all()
        os.close(daemon.manager.fds.pop()[1])
        daemon.start_again()
        wait_until(lambda: "nothing is taken over: all VMs end" in daemon.log(), "the log says so")
        assert at_end(pod.vm.io)
        assert wire.pod().pings()
        wire.close()


def test_a_process_that_dies_before_it_has_taken_over_costs_nothing(tmp_sock_dir: Path) -> None:
    """Whatever it has looked at is still there for the next one."""
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        daemon.leave_all()
        with closing(daemon.manager.box()) as box:
            for _ in range(5):
                close_all(box.look()[1])
        daemon.start_again()
        assert pod.pings()
        wire.close()


def test_a_restart_in_the_middle_of_a_restart(tmp_sock_dir: Path) -> None:
    """A manager that does not know yet that a process is ready ends it like one that is to stop."""
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        stream = pod.open()
        daemon.leave_all()
        for _ in range(2):
            assert daemon.start_and_end() == os.EX_TEMPFAIL
        daemon.start_again()
        pod.vm.io.sendall(frame(stream.base, b"on"))
        assert stream.read_frame().payload == b"on"
        assert pod.pings()
        wire.close()


def test_a_state_of_a_newer_daemon_is_an_end_that_is_logged(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        daemon.leave_all()
        with closing(daemon.manager.box()) as box:
            state, fds = box.look()
            key = b"\xa7version"
            assert state.count(key + bytes([VERSION])) == 1
            newer = state.replace(key + bytes([VERSION]), key + b"\x63")
            box.put_state(newer, {fd: identity_of(fd) for fd in fds})
            close_all(fds)
        daemon.start_again()
        wait_until(lambda: "nothing is taken over" in daemon.log(), "the log says so")
        assert at_end(pod.vm.io)
        assert wire.pod().pings()
        wire.close()
