"""Restarts of the daemon that nobody notices, and the ends that everybody does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.systemd.service import SERVICE, SOCKET, Service
from tests.wire.daemon import Pod
from tests.wire.support import READY, VERSIONED, FakeVm, RawClient, Stream, at_end, frame, request

_DIRECTORY = "/var/tmp/vms"
#: Restarts in a row, while streams go on in both directions.
MANY = 100
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
        directory.rmdir()


def goes_on(pod: Pod, stream: Stream) -> bool:
    """Whether frames pass both ways, and commands, as if nothing had been."""
    pod.vm.io.sendall(frame(stream.base, b"output"))
    stream.send(b"stdin")
    assert stream.read_frame().payload == b"output"
    assert pod.vm.read_frame().payload == b"stdin"
    return pod.pings()


@pytest.mark.parametrize("unit", [SERVICE, SOCKET])
def test_nobody_notices_a_restart(daemon: Service, unit: str) -> None:
    with pod(daemon) as vm:
        stream, before = vm.open(), daemon.pid
        vm.vm.io.sendall(frame(stream.base, b"first half, second half")[:20])
        daemon.box.run("systemctl", "restart", unit)
        assert daemon.pid != before
        vm.vm.io.sendall(frame(stream.base, b"first half, second half")[20:])
        assert stream.read_frame().payload == b"first half, second half"
        assert goes_on(vm, stream)
        assert daemon.wait_for_log("taken over from the process before")


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


def test_without_a_store_the_daemon_says_so_and_a_restart_is_an_end(service: Service) -> None:
    service.drop_in("[Service]\nFileDescriptorStoreMax=0\n")
    service.start(SERVICE)
    assert "FileDescriptorStoreMax" in service.wait_for_log("a restart of cc-proxy ends all VMs")["MESSAGE"]
    with pod(service) as vm:
        stream = vm.open()
        service.box.run("systemctl", "restart", SERVICE)
        assert stream.at_end()


def test_every_byte_arrives_through_many_restarts(daemon: Service) -> None:
    daemon.drop_in(_NO_LIMIT)
    sizes = {"sent": 0, "echoed": 0}
    pauses: list[float] = []
    with pod(daemon) as vm:
        stream, stop = vm.open(), threading.Event()

        def echo() -> None:
            """The process: sends back its stdin."""
            while (got := vm.vm.read_frame()).payload != b"end":
                if got.seq < 1 << 63:
                    vm.vm.io.sendall(frame(got.seq, got.payload))
                    sizes["echoed"] += 1
                else:
                    vm.vm.io.sendall(frame(got.seq))

        def talk() -> None:
            while not stop.is_set():
                text = b"%d" % sizes["sent"]
                begun = time.monotonic()
                stream.send(text)
                assert stream.read_frame().payload == text
                pauses.append(time.monotonic() - begun)
                sizes["sent"] += 1
            stream.send(b"end")

        threads = [threading.Thread(target=work) for work in (echo, talk)]
        for thread in threads:
            thread.start()
        for _ in range(MANY):
            daemon.box.run("systemctl", "restart", SERVICE)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert sizes["sent"] == sizes["echoed"] > MANY
        assert vm.pings()
    longest = sorted(pauses)[-MANY:]
    print(f"{MANY} restarts, {len(pauses)} echoes; pauses {longest[-1]:.3f}, {longest[MANY // 2]:.3f} s")
