"""The daemon is killed, and its VMs, sessions and connections go on with the next process."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.continuity.box import close_all
from cc_proxy.continuity.cells import AT_STATE, FINISH_AT, State
from cc_proxy.linux.fds import identity_of
from tests.wire.crowded import crowd
from tests.wire.daemon import PATIENT, ManagedDaemon, Pod, Wire, own_daemon
from tests.wire.successors import KILLED_AT_A_SEND
from tests.wire.support import (
    OK,
    READY,
    VERSIONED,
    WAIT,
    at_end,
    error_of,
    frame,
    hello_data,
    listen_at,
    refused,
    request,
    wait_until,
)

LOST = "cc-proxy was killed before it answered: whether the request was carried out is unknown"


@pytest.fixture
def town(tmp_sock_dir: Path) -> Iterator[Wire]:
    """A daemon under a manager, its VMs and clients."""
    with own_daemon(tmp_sock_dir, start=ManagedDaemon, check=True) as wire:
        yield wire


def daemon_of(wire: Wire) -> ManagedDaemon:
    assert isinstance(wire.daemon, ManagedDaemon)
    return wire.daemon


def test_nobody_notices_at_rest(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    other = town.attached(pod)
    second = pod.open(1, client=other)
    for _ in range(5):
        daemon_of(town).crash()
        pod.vm.answer_questions()
        for each in (stream, second):
            pod.vm.io.sendall(frame(each.base, b"from the VM"))
            each.send(b"from the client")
            assert each.read_frame().payload == b"from the VM"
            assert pod.vm.next_frame().payload == b"from the client"
        assert pod.pings()
        assert pod.pings(other)
    assert pod.open(1).base == second.base + 1


def test_a_command_in_flight_gets_an_error(town: Wire) -> None:
    pod = town.pod()
    pod.client.hyper("ping", '"lost"')
    assert pod.vm.read_command().payload == b'"lost"'
    daemon_of(town).crash()
    assert pod.client.receive() == refused(LOST)
    pod.client.hyper("ping", '"next"')
    pod.vm.say(9)  # which was not for the next one
    pod.vm.answer_questions()
    assert pod.vm.acknowledge().payload == b'"next"'
    assert pod.client.receive() == OK


@pytest.mark.parametrize("when", ["before", "behind"])
def test_killed_as_it_sends_a_response(town: Wire, when: str) -> None:
    """Its client gets one answer, and only one."""
    pod, daemon = killed_at_a_send(town, when, "'last'")
    pod.client.hyper("last")
    daemon.process.wait(WAIT)
    daemon.start_again()
    said = "unknown command 'last'" if when == "behind" else LOST
    assert pod.client.receive() == refused(said)
    pod.client.hyper("next")
    assert pod.client.receive() == refused("unknown command 'next'")


@pytest.mark.parametrize("when", ["before", "behind"])
def test_killed_as_it_passes_an_fd(town: Wire, when: str) -> None:
    """Its client has the fd, or is hung up."""
    pod, daemon = killed_at_a_send(town, when, "F")
    assert pod.pings()
    pod.client.send(request("allocateIO", {"nStreams": 1}))
    daemon.process.wait(WAIT)
    daemon.start_again()
    if when == "before":
        assert json.loads(pod.client.receive())["data"] == {"ioBase": 1}
        assert at_end(pod.client.sock)
        return
    stream = pod.client.receive_io()
    pod.vm.answer_questions()
    pod.vm.io.sendall(frame(stream.base, b"on"))
    assert stream.read_frame().payload == b"on"
    assert pod.pings()


def killed_at_a_send(town: Wire, when: str, text: str) -> tuple[Pod, ManagedDaemon]:
    """A pod, and its daemon, which is killed before or behind the send of something that has `text` in it."""
    pod, daemon = town.pod(), daemon_of(town)
    daemon.die()
    daemon.start_again([sys.executable, "-c", KILLED_AT_A_SEND, when, text])
    pod.vm.answer_questions()
    return pod, daemon


def test_several_requests_at_once_are_hung_up(town: Wire) -> None:
    """Of those that were read behind the one that is being answered nothing is left."""
    pod, daemon = killed_at_a_send(town, "behind", "'1'")
    pod.client.send(b"".join(request("hyper", {"hyperName": name}) for name in "12"))
    daemon.process.wait(WAIT)
    daemon.start_again()
    assert pod.client.receive() == refused("unknown command '1'")
    assert at_end(pod.client.sock)


def test_whoever_is_attached_stays_so(town: Wire) -> None:
    """A client that has done no more than attach, and is not new."""
    pods = [town.pod(), town.pod()]
    clients = [town.attached(pod) for pod in pods]
    wait_until(lambda: kept(town) == 6, "two VMs and four connections are kept")
    daemon_of(town).crash()
    for pod, client in zip(pods, clients, strict=True):
        pod.vm.answer_questions()
        assert pod.pings(client)


def kept(town: Wire) -> int:
    """How much is kept: VMs, sessions, and connections."""
    return len(list(daemon_of(town).manager.table().entries()))


def test_a_hello_in_flight_is_let_go(town: Wire) -> None:
    client, vm = town.client(), town.vm()
    client.hello("web", vm)
    vm.accept()
    wait_until(lambda: town.is_taken("web"), "it is connected")
    daemon_of(town).crash()
    assert client.receive() == refused(LOST)
    assert vm.is_hung_up()
    vm = town.vm()
    client.hello("web", vm)
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    assert client.allocate(1).base == 1


def test_a_vm_that_has_gone_keeps_its_id(town: Wire) -> None:
    pod = town.pod()
    pod.vm.io.close()
    wait_until(lambda: "VM lost" in town.daemon.log(), "it is lost")
    daemon_of(town).crash()
    pod.client.hyper("ping")
    assert "VM gone" in error_of(pod.client.receive()), "it is still attached"
    assert pod.client.attach(pod.container) == VERSIONED
    pod.client.hyper("ping")
    assert "VM gone" in error_of(pod.client.receive())
    assert pod.client.bye(pod.container) == OK
    daemon_of(town).crash()
    assert pod.client.attach(pod.container) == refused(f"unknown containerID: {pod.container}")


def test_a_vm_that_was_being_lost_says_so(town: Wire) -> None:
    """Its client has not read what it sent."""
    pod = town.pod()
    stream = pod.open(1)
    for _ in range(400):
        pod.vm.io.sendall(frame(stream.base, bytes(10_000)))
    wait_until(lambda: status(town)["spooled"] > 0, "it is spooled")
    pod.vm.io.close()
    wait_until(lambda: "VM lost" in town.daemon.log(), "it is lost")
    daemon_of(town).crash()
    pod.client.hyper("ping")
    assert "VM gone: it was lost" in error_of(pod.client.receive())


def test_a_vm_that_was_being_lost_costs_no_other(town: Wire) -> None:
    """Its channels are closed, and its client has not read what it sent. The box has been packed since."""
    pod, other = town.pod(), town.pod()
    stream = pod.open(1)
    for _ in range(400):
        pod.vm.io.sendall(frame(stream.base, bytes(10_000)))
    wait_until(lambda: status(town)["spooled"] > 0, "it is spooled")
    pod.vm.io.close()
    wait_until(lambda: "VM lost" in town.daemon.log(), "it is lost")
    have_packed(other)
    daemon_of(town).crash()
    other.vm.answer_questions()
    assert other.pings()
    pod.client.hyper("ping")
    assert "VM gone: it was lost" in error_of(pod.client.receive())


def test_a_vm_whose_console_has_hung_up_goes_on(tmp_sock_dir: Path) -> None:
    logged = f'[log]\nlevel = "console"\n{PATIENT}'
    with own_daemon(tmp_sock_dir, logged, start=ManagedDaemon, check=True) as town:
        path = tmp_sock_dir / "console"
        vm, client = town.vm(), town.client()
        with closing(listen_at(path)) as listener:
            client.send(request("hello", hello_data("c", vm) | {"console": str(path)}))
            vm.accept()
            listener.accept()[0].close()
        vm.say(READY)
        assert client.receive() == VERSIONED
        pod = Pod("c", client, vm)
        have_packed(pod)
        daemon_of(town).crash()
        vm.answer_questions()
        assert pod.pings()


@pytest.mark.parametrize("part", ["stream", "connection"])
def test_killed_between_closing_an_fd_and_forgetting_it(town: Wire, part: str) -> None:
    pod, daemon = town.pod(), daemon_of(town)
    client = town.attached(pod)
    stream = pod.open(1)
    assert pod.pings(client)
    daemon.die()
    with closing(daemon.manager.box()) as box:
        _, fds = box.look()
        closed = next(fd for fd in fds if what_it_is(fd) == part)
        box.drop(box.messages)
        box.put({fd: identity_of(fd) for fd in fds if fd != closed})
        close_all(fds)
    daemon.start_again()
    pod.vm.answer_questions()
    if part == "stream":
        assert stream.at_end()
        assert pod.pings()
        assert pod.pings(client)
    else:
        pod.vm.send_frame(stream.base, b"on")
        assert stream.read_frame().payload == b"on"


def what_it_is(fd: int) -> str:
    """A stream or a connection of a client's, or neither."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return "neither"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    try:
        ours, theirs = sock.getsockname(), sock.getpeername()
    except OSError:
        return "neither"
    finally:
        sock.detach()
    if theirs:
        return "neither"
    return "connection" if ours else "stream"


def have_packed(pod: Pod) -> None:
    """Have the box packed, as it is long before it has so many messages."""
    for _ in range(300):
        pod.client.allocate(1).close()


def test_what_ended_before_is_not_found_again(town: Wire) -> None:
    pod = town.pod()
    stream, other = pod.open(), pod.open()
    stream.close()
    client = town.attached(pod)
    client.hyper("ping", '"1"')
    pod.vm.acknowledge()
    assert client.receive() == OK
    client.close()
    wait_until(lambda: status(town)["vms"][0]["streams"]["sessions"] == 1, "the session is closed")
    daemon_of(town).crash()
    pod.vm.answer_questions()
    assert pod.pings()
    assert status(town)["vms"][0]["streams"]["sessions"] == 1
    pod.vm.io.sendall(frame(other.base, b"on"))
    assert other.read_frame().payload == b"on"


def status(town: Wire) -> Any:
    with closing(town.daemon.connect()) as client:
        return json.loads(client.ask("status"))["data"]


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_under_load_what_is_missing_is_said(town: Wire, times: int) -> None:
    """Frames come whole, in order, and to their own clients; what does not is in the log, as a gap."""
    pods = [town.pod() for _ in range(2)]
    client = town.attached(pods[0])
    with crowd(pods, client, 2) as load:
        for crashes in range(times + 1):
            before = load.moved
            wait_until(functools.partial(load.goes_on, before), "all go on")
            said = gaps(town, crashes)  # a process that is killed before its log is written has said nothing
            if crashes < times:
                daemon_of(town).crash()
    assert set(load.answers) <= {OK, refused(LOST)}
    assert load.asked == load.answers.total(), "each command has one answer"
    for direction, tracks in (("output", load.output), ("stdin", load.stdin)):
        missing = sum(track.missing for track in tracks)
        assert missing <= sum(gap["most_bytes"] for gap in said if gap["direction"] == direction)
        print(direction, missing, "bytes missing of", sum(track.came for track in tracks))
    print(len(said), "gaps;", load.answers)
    assert "hung up" not in town.daemon.log()
    assert status(town)["replaced"] == {"restarts": 0, "crashes": times, "last": "crash"}


def gaps(town: Wire, crashes: int) -> list[Any]:
    """What the log has, once it has it all."""
    taken_over = "taken over from the previous process"
    wait_until(lambda: town.daemon.log().count(taken_over) == crashes, "it is in the log")
    lines = map(json.loads, town.daemon.log().splitlines())
    return [line for line in lines if line["message"].startswith("gap")]


def test_a_client_that_was_slow_is_hung_up_or_goes_on(town: Wire) -> None:
    """What was spooled for it is a gap; it never gets a part of a frame."""
    pod = town.pod()
    stream, other = pod.open(1), pod.open(1)
    payload = os.urandom(10_000)
    for _ in range(400):
        pod.vm.io.sendall(frame(stream.base, payload))
    wait_until(lambda: status(town)["spooled"] > 0, "it is spooled")
    daemon_of(town).crash()
    said = [gap["most_bytes"] for gap in gaps(town, 1)]
    assert max(said) > 1_000_000
    assert (status(town)["gaps"], status(town)["lost"]) == (len(said), sum(said))
    pod.vm.answer_questions()
    pod.vm.io.sendall(frame(stream.base, b"last") + frame(other.base, b"on"))
    assert other.read_frame().payload == b"on"
    while (got := stream.read_frame().payload) != b"last":
        assert got == payload
    town.daemon.replace()
    assert status(town)["gaps"] == len(said)


def test_a_gap_still_counts_if_the_next_crash_comes_at_once(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open(1)
    for _ in range(400):
        pod.vm.io.sendall(frame(stream.base, os.urandom(10_000)))
    wait_until(lambda: status(town)["spooled"] > 0, "it is spooled")
    for crashes in (1, 2):
        daemon_of(town).crash()
        said = [gap["most_bytes"] for gap in gaps(town, crashes)]
    assert said
    assert (status(town)["gaps"], status(town)["lost"]) == (len(said), sum(said))


def test_the_linger_after_bye_goes_on(town: Wire) -> None:
    pod, daemon = town.pod(), daemon_of(town)
    stream = pod.open(1)
    assert pod.client.bye(pod.container) == OK
    [left] = crash_as_it_lingers(daemon, 50)
    assert 0 < left <= 60
    pod.vm.answer_questions()
    pod.vm.io.sendall(frame(stream.base, b"on"))
    assert stream.read_frame().payload == b"on"
    [left] = crash_as_it_lingers(daemon, 0)
    assert left < 50, "it did not begin anew"
    assert stream.at_end()


def crash_as_it_lingers(daemon: ManagedDaemon, then: float) -> list[float]:
    """Crash; returns how long each VM would have lingered still. It lingers for `then` seconds instead."""

    def cells() -> list[memoryview]:
        cells = [entry.cell for entry in daemon.manager.table().entries()]
        return [cell for cell in cells if cell[AT_STATE] == State.LEAVING.value]

    wait_until(lambda: all(cell[FINISH_AT] for cell in cells()), "its pump has heard of it")
    daemon.die()
    now = time.monotonic()
    left = [cell[FINISH_AT] / 1e9 - now for cell in cells()]
    for cell in cells():
        cell[FINISH_AT] = int((now + then) * 1e9)
    daemon.start_again()
    return left


# Bad luck -------------------------------------------------------------------------------------------------


def test_killed_again_and_again_before_it_has_taken_over(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    daemon = daemon_of(town)
    daemon.die()
    for delay in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        daemon.start_and_kill(delay)
    daemon.start_again()
    pod.vm.io.sendall(frame(stream.base, b"on"))
    assert stream.read_frame().payload == b"on"


def test_processes_that_all_end_at_once_are_bounded(town: Wire) -> None:
    """The start limit would leave nobody to serve."""
    pod = town.pod()
    stream = pod.open()
    daemon = daemon_of(town)
    daemon.die()
    for _ in range(10):
        daemon.start_again()
        daemon.process.kill()
        daemon.process.wait(WAIT)
    assert "nothing is taken over" not in daemon.log()
    daemon.start_again()
    wait_until(
        lambda: "10 processes have ended within seconds of taking it over" in daemon.log(), "the log says so"
    )
    assert stream.at_end()
    assert at_end(pod.client.sock)
    daemon.crash()
    town.attached(town.pod())


def test_killed_as_it_hands_over(town: Wire) -> None:
    pod = town.pod()
    stream = pod.open()
    daemon = daemon_of(town)
    for delay in (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05):
        daemon.process.send_signal(signal.SIGUSR2)
        threading.Event().wait(delay)
        daemon.die()
        daemon.start_again()
        pod.vm.io.sendall(frame(stream.base, b"on"))
        assert stream.read_frame().payload == b"on"
    assert "nothing is taken over" not in daemon.log()


@pytest.mark.parametrize("spoil", ["another version", "shorter", "torn", "no sense", "a newer daemon"])
def test_a_table_that_cannot_be_read_is_an_end_that_is_logged(tmp_sock_dir: Path, spoil: str) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        stream = pod.open()
        daemon.die()
        table = daemon.manager.table()
        if spoil == "another version":
            table.memory[7] += 1
        elif spoil == "shorter":
            [fd] = daemon.manager.find("cc-proxy-table")
            os.ftruncate(fd, 65_536)
            os.close(fd)
        elif spoil == "no sense":
            for entry in table.entries():
                entry.cell[AT_STATE] = 99
        elif spoil == "torn":
            at = table.memory.find(pod.container.encode())
            table.memory[at - 3 : at] = b"\xc1\xc1\xc1"
        else:
            at = table.memory.find(b"\xa7version") + 8
            table.memory[at] += 1
        daemon.start_again()
        wait_until(lambda: "nothing is taken over" in daemon.log(), "it is in the log")
        assert stream.at_end()
        assert at_end(pod.vm.io)
        assert at_end(pod.client.sock)
        after = wire.pod()
        daemon.crash()
        after.vm.answer_questions()
        assert after.pings()
        wire.close()


def test_without_a_store_a_crash_is_an_end(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir, most_fds=3) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        wait_until(lambda: "a restart of cc-proxy ends all VMs" in daemon.log(), "the log says so")
        pod = wire.pod()
        daemon.crash()
        assert at_end(pod.vm.io)
        assert at_end(pod.client.sock)
        wire.close()


def test_what_died_meanwhile_is_noticed(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        first, second = wire.pod(), wire.pod()
        stream = second.open()
        daemon.die()
        first.vm.hang_up()
        first.client.close()
        stream.close()
        daemon.start_again()
        second.vm.answer_questions()
        second.vm.send_frame(second.vm.read_frame().seq)  # a marker: it has handled what came before
        wait_until(lambda: not wire.is_registered(first.container), "the VM is lost")
        wait_until(lambda: not status(wire)["vms"][-1]["streams"]["sessions"], "the session is closed")
        assert second.pings()
        wire.close()
        daemon.check()


def test_a_stop_leaves_nothing(tmp_sock_dir: Path) -> None:
    with ManagedDaemon(tmp_sock_dir) as daemon:
        wire = Wire(daemon, tmp_sock_dir)
        pod = wire.pod()
        assert daemon.stop() == 0
        assert at_end(pod.client.sock)
        daemon.start_again()
        assert "taken over" not in daemon.log()
        wire.close()
