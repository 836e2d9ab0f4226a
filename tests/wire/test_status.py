"""What the daemon says of itself over its socket."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.wire.daemon import PATIENT, Pod, Wire, own_daemon
from tests.wire.support import OK, PING, error_of, frame, in_background, wait_until


@pytest.fixture
def tight(tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon of its own, whose spool takes little."""
    spool = f'[spool]\ndirectory = "{tmp_sock_dir}"\nsession_limit = {25 * mmap.PAGESIZE}\n'
    with own_daemon(tmp_sock_dir, PATIENT + spool, check=True) as wire:
        yield wire


def status(wire: Wire) -> Any:
    answer = json.loads(wire.client().ask("status"))
    assert answer["success"] is True
    return answer["data"]


def vm_status(wire: Wire, pod: Pod) -> Any:
    (vm,) = (vm for vm in status(wire)["vms"] if vm["id"] == pod.container)
    return vm


def test_the_daemon_itself(wire: Wire) -> None:
    answer = status(wire)
    assert answer["pid"] == wire.daemon.pid
    assert answer["uptime"] > 0
    assert answer["settingsFile"] == str(wire.daemon.log_path.parent / "cc-proxy.toml")
    assert answer["logLevel"] == "info"
    assert answer["connections"] >= 1


def test_a_vm_with_clients_and_what_passed(wire: Wire) -> None:
    pod = wire.pod()
    other = wire.attached(pod)
    first, second = pod.open(), other.allocate()
    pod.vm.io.sendall(frame(first.base, b"out") + frame(second.base, b"more") * 50 + frame(99, b"nobody's"))
    assert first.read_frame().payload == b"out"
    first.send(b"in")
    assert pod.vm.read_frame().payload == b"in"
    wait_until(lambda: vm_status(wire, pod)["streams"]["traffic"]["strayFrames"] == 1, "all is read")
    vm = vm_status(wire, pod)
    assert (vm["state"], vm["clients"], vm["answers"], vm["lastError"]) == ("up", 2, True, None)
    streams = vm["streams"]
    assert (streams["sessions"], streams["paused"], streams["waiting"]) == (2, False, [])
    assert streams["traffic"] == {
        "bytesToClients": 15 + 16 * 50,
        "bytesToVm": 14,
        "framesToClients": 51,
        "framesToVm": 1,
        "strayFrames": 1,
        "pauses": 0,
    }


def test_vms_stand_by_their_ids_and_those_that_had_the_same_one_in_turn_by_age(wire: Wire) -> None:
    ids = sorted(wire.new_id() for _ in range(3))
    for _ in range(3):
        for container in reversed(ids):
            pod = wire.pod(container=container)
            assert pod.client.bye(container) == OK  # they linger
    wire.pod(container=ids[1])
    states = [(vm["id"], vm["state"]) for vm in status(wire)["vms"] if vm["id"] in ids]
    assert states == [
        *[(ids[0], "leaving")] * 3, *[(ids[1], "leaving")] * 3, (ids[1], "up"), *[(ids[2], "leaving")] * 3,
    ]  # fmt: skip


def test_who_does_not_read_and_holds_up_the_vm(tight: Wire) -> None:
    pod = tight.pod()
    slow = pod.open()
    sent = frame(slow.base, bytes(10_000)) * 500
    with in_background(lambda: pod.vm.io.sendall(sent)):
        wait_until(lambda: vm_status(tight, pod)["streams"]["traffic"]["pauses"] == 1, "the VM is paused")
        vm = vm_status(tight, pod)
        spooled = status(tight)["spooled"]
        slow.close()
    streams = vm["streams"]
    assert streams["paused"] is True
    (waiting,) = streams["waiting"]
    assert (waiting["stream"], waiting["holdsVm"], waiting["reason"]) == (1, True, "the spool is full")
    assert waiting["spooled"] == streams["spooled"] == spooled == 25 * mmap.PAGESIZE
    assert waiting["pending"] == streams["pending"] > 0
    assert 0 <= waiting["idle"] < vm["age"]
    wait_until(lambda: not vm_status(tight, pod)["streams"]["paused"], "it goes on")


def test_commands_that_wait_for_the_agent(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("ping")
    assert pod.vm.read_command().code == PING
    other = wire.attached(pod)
    other.hyper("version")
    wait_until(lambda: vm_status(wire, pod)["waitingCommands"] == 2, "both wait")
    vm = vm_status(wire, pod)
    assert [command["name"] for command in vm["commands"]] == ["ping", "version"]
    assert vm["unanswered"] == 1
    assert vm["commands"][0]["age"] >= vm["commands"][1]["age"] >= 0
    pod.vm.say(10, b"no")  # ERROR
    error_of(pod.client.receive())
    pod.vm.acknowledge()
    other.receive()
    vm = vm_status(wire, pod)
    assert (vm["commands"], vm["unanswered"]) == ([], 0)
    assert vm["lastError"]["text"] == "ping: ERROR received from Hyperstart: no"


def test_a_vm_that_is_lost_is_remembered_and_one_that_left_is_not(wire: Wire) -> None:
    lost, left = wire.pod(), wire.pod()
    lost.vm.hang_up()
    left.client.bye(left.container)
    left.vm.hang_up()
    wait_until(lambda: lost.container in {vm["id"] for vm in status(wire)["ended"]}, "it is gone")
    (ended,) = (vm for vm in status(wire)["ended"] if vm["id"] == lost.container)
    assert "hung up" in ended["error"]["text"]
    wait_until(lambda: left.container not in {vm["id"] for vm in status(wire)["vms"]}, "it has left")
    assert left.container not in {vm["id"] for vm in status(wire)["ended"]}


def test_the_log_level_changes_at_once_and_says_so(tight: Wire) -> None:
    client = tight.client()
    changed = b'{"success":true,"data":{"old":"info","new":"debug"}}'
    assert client.ask("logLevel", {"level": "debug"}) == changed
    assert status(tight)["logLevel"] == "debug"
    pod = tight.pod()
    assert pod.pings()
    wait_until(lambda: '"command": "ping"' in tight.daemon.log(), "requests and their commands are logged")
    assert client.ask("logLevel", {"level": "error"}).endswith(b'{"old":"debug","new":"error"}}')
    wait_until(lambda: tight.daemon.log().count("log level changed") == 2, "the change is logged")


@pytest.mark.parametrize("level", ["", "INFO", "none", "\u001b[2J"])
def test_a_level_nobody_knows_changes_nothing(wire: Wire, level: str) -> None:
    before = status(wire)["logLevel"]
    text = error_of(wire.client().ask("logLevel", {"level": level}))
    assert text == f"unknown log level '{level}': it is one of error, warning, info, debug, io, console"
    assert status(wire)["logLevel"] == before
