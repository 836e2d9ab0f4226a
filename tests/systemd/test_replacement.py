"""Restarts of the daemon that nobody notices, and the ends that everybody does."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.echoes import all_moved, echoes
from tests.systemd.service import SERVICE, SOCKET, Service
from tests.wire.daemon import Pod
from tests.wire.support import READY, VERSIONED, FakeVm, RawClient, Stream, at_end, frame, request, wait_until

_DIRECTORY = "/var/tmp/vms"
#: What takes more than a minute: `pytest -m "systemd and slow"`.
MANY = pytest.mark.slow, pytest.mark.timeout(600)
#: What the start limit of the unit does not let through in the time of a test.
_NO_LIMIT = "[Unit]\nStartLimitIntervalSec=0\n"


@contextmanager
def pod(service: Service, container: str = "pod") -> Iterator[Pod]:
    """A registered VM, and the client that said hello for it: both are outside the box."""
    directory = service.box.path(_DIRECTORY)
    directory.mkdir(exist_ok=True)
    fake = FakeVm(directory, container)
    client = RawClient(service.socket_file)
    try:
        names = [f"{_DIRECTORY}/{path.name}" for path in (fake.ctl_path, fake.io_path)]
        client.send(request("hello", {"containerId": container, "ctlSerial": names[0], "ioSerial": names[1]}))
        fake.accept()
        fake.say(READY)
        assert client.receive() == VERSIONED
        yield Pod(container, client, fake)
    finally:
        client.close_all()
        fake.close()
        for path in (fake.ctl_path, fake.io_path):
            path.unlink(missing_ok=True)
        if not any(directory.iterdir()):  # other pods may be there
            directory.rmdir()


def goes_on(pod: Pod, stream: Stream) -> bool:
    """Whether frames pass both ways, and commands, as if nothing had been."""
    pod.vm.io.sendall(frame(stream.base, b"output"))
    stream.send(b"stdin")
    assert stream.read_frame().payload == b"output"
    assert pod.vm.next_frame().payload == b"stdin"
    return pod.pings()


@pytest.mark.parametrize("unit", [SERVICE, SOCKET])
def test_nobody_notices_a_restart(daemon: Service, unit: str) -> None:
    with pod(daemon) as vm:
        stream = vm.open()
        vm.vm.io.sendall(frame(stream.base, b"first half, second half")[:20])
        _restart(daemon, unit)
        vm.vm.io.sendall(frame(stream.base, b"first half, second half")[20:])
        assert stream.read_frame().payload == b"first half, second half"
        assert goes_on(vm, stream)
        assert daemon.wait_for_log("taken over from the previous process")


def test_a_stop_is_an_end(daemon: Service) -> None:
    with pod(daemon) as vm:
        stream = vm.open()
        vm.vm.io.sendall(frame(stream.base, b"last words"))
        daemon.stop(SERVICE)
        assert stream.read_frame().payload == b"last words"
        assert stream.at_end()
        assert at_end(vm.vm.io)
        assert at_end(vm.client.sock)
        daemon.start(SERVICE)
        assert not [each for each in daemon.logged() if "taken over" in each["MESSAGE"]]


def test_restarts_do_not_count_for_the_start_limit(daemon: Service) -> None:
    daemon.drop_in("[Unit]\nStartLimitBurst=2\n")
    with pod(daemon) as vm:
        stream = vm.open()
        for _ in range(3):
            daemon.box.run("systemctl", "restart", SERVICE)
        assert goes_on(vm, stream)


def test_a_socket_unit_that_is_wrong_by_then_ends_nothing(daemon: Service) -> None:
    with pod(daemon) as vm:
        stream = vm.open()
        daemon.drop_in("[Socket]\nListenStream=/run/cc-oci-runtime/second.sock\n", SOCKET)
        daemon.box.run("systemctl", "restart", SOCKET)
        assert "exactly one socket" in daemon.wait_for_log("the one from before stays")["MESSAGE"]
        assert goes_on(vm, stream)


def test_settings_that_cannot_be_read_end_nothing(daemon: Service) -> None:
    with pod(daemon) as vm:
        stream = vm.open()
        daemon.configure("[nonsense]\n")
        daemon.box.run("systemctl", "restart", SERVICE)
        assert goes_on(vm, stream)
        assert daemon.wait_for_log("settings not read")


def test_a_version_that_ends_at_once_costs_nothing_until_there_is_a_better_one(daemon: Service) -> None:
    with pod(daemon) as vm:
        stream = vm.open()
        daemon.drop_in("[Service]\nExecStart=\nExecStart=/bin/false\nType=notify\n")
        daemon.box.run("systemctl", "restart", SERVICE, check=False)
        daemon.wait_for("NRestarts", "5")
        daemon.undo(SERVICE)
        daemon.wait_for("ActiveState", "active")
        assert goes_on(vm, stream)


def test_a_daemon_of_a_version_that_knows_nothing_of_this_is_stopped_in_peace(daemon: Service) -> None:
    code = (
        "import os, signal, socket; signal.signal(signal.SIGTERM, lambda *_: print('drained', flush=True)); "
    )
    code += "sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
    code += "sock.sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); signal.pause()"
    daemon.drop_in(f'[Service]\nExecStart=\nExecStart={sys.executable} -c "{code}"\n')
    daemon.stop(SERVICE)
    daemon.start(SERVICE)
    daemon.box.run("systemctl", "restart", SERVICE)
    assert [line["MESSAGE"] for line in daemon.logged()].count("drained") == 1


def test_without_a_store_the_daemon_says_so_and_a_restart_is_an_end(service: Service) -> None:
    service.drop_in("[Service]\nFileDescriptorStoreMax=0\n")
    service.start(SERVICE)
    assert "FileDescriptorStoreMax" in service.wait_for_log("a restart of cc-proxy ends all VMs")["MESSAGE"]
    with pod(service) as vm:
        stream = vm.open()
        service.box.run("systemctl", "restart", SERVICE)
        assert stream.at_end()


def test_a_restart_in_the_middle_of_a_restart(daemon: Service) -> None:
    """Also when systemd has started the next process and does not know yet whether it is ready."""
    daemon.drop_in(_NO_LIMIT)
    with pod(daemon) as vm:
        stream = vm.open()
        for hundredths in (15, 30, 45):
            before = daemon.pid
            restart = f"systemctl restart {SERVICE}"
            daemon.box.run("sh", "-c", f"{restart} & sleep 0.{hundredths:02}; {restart}; wait")
            assert daemon.pid not in (0, before)
            assert goes_on(vm, stream), hundredths


@pytest.mark.parametrize("restarts", [10, pytest.param(100, marks=MANY)])
def test_every_byte_arrives_through_many_restarts(daemon: Service, restarts: int) -> None:
    """Of the service or of its socket, while bytes go both ways in all sessions; and systemd itself."""
    daemon.drop_in(_NO_LIMIT)
    with ExitStack() as stack:
        pods = [stack.enter_context(pod(daemon, name)) for name in ("first", "second", "third")]
        with echoes(pods, each=4) as streams:
            for number in range(restarts):
                _restart(daemon, SOCKET if number % 5 == 4 else SERVICE)
                before = [stream.sent for stream in streams]
                if number % 10 == 5:
                    daemon.box.run("systemctl", "daemon-reexec")
                wait_until(functools.partial(all_moved, streams, before), "bytes go on in all of them")
        assert all(pod.pings() for pod in pods)
        with daemon.client() as client:
            assert client.status().replaced.restarts == restarts
        assert daemon.show("NFileDescriptorStore") == "4"
    sent = sum(stream.sent for stream in streams)
    taken = [json.loads(line["MESSAGE"]) for line in daemon.logged() if "taken over" in line["MESSAGE"]]
    pauses = sorted(line["seconds"] for line in taken)
    print(f"{restarts} restarts, {sent} bytes; pauses {pauses[len(pauses) // 2]}, at most {pauses[-1]} s")


def _restart(daemon: Service, unit: str) -> None:
    """Restart a unit, and wait for another process of the daemon: systemctl does so for the service only."""
    before = daemon.pid
    daemon.box.run("systemctl", "restart", unit)
    wait_until(lambda: daemon.pid not in (0, before), "another process is there")
    daemon.wait_for("ActiveState", "active")


# Crashes --------------------------------------------------------------------------------------------------


def comes_again(service: Service, before: int) -> None:
    """Wait until another process is up."""
    wait_until(lambda: service.pid not in (0, before), "another process")
    service.wait_for("ActiveState", "active")


def answers_after_a_crash(pod: Pod, stream: Stream) -> bool:
    """Whether all goes on once the agent has answered the questions that are asked after a crash."""
    pod.vm.answer_questions()
    return goes_on(pod, stream)


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=MANY)])
def test_nobody_notices_that_it_was_killed(daemon: Service, times: int) -> None:
    daemon.drop_in(_NO_LIMIT)
    with pod(daemon) as vm:
        stream = vm.open()
        for number in range(times):
            before = daemon.pid
            daemon.kill("KILL")
            comes_again(daemon, before)
            assert answers_after_a_crash(vm, stream)
            if number % 8 == 7:  # else it would seem that what they find ends them
                daemon.box.run("systemctl", "restart", SERVICE)
        assert daemon.wait_for_log("taken over from the previous process", times=times)


def test_nobody_notices_that_the_watchdog_has_ended_it(daemon: Service) -> None:
    daemon.drop_in("[Service]\nWatchdogSec=1s\nLimitCORE=0\n")
    daemon.box.run("systemctl", "restart", SERVICE)
    with pod(daemon) as vm:
        stream, before = vm.open(), daemon.pid
        daemon.kill("STOP")
        comes_again(daemon, before)
        assert answers_after_a_crash(vm, stream)
        assert daemon.wait_for_log("Watchdog timeout")
