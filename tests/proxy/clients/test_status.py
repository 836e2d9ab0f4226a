"""A status put together: pumps that do not answer, and what is bounded."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import cast

import msgspec

from cc_proxy.api import (
    EndedVm,
    LastError,
    Status,
    Streams,
    Traffic,
    UserStatus,
    VmStatus,
    WaitingCommand,
    WaitingStream,
)
from cc_proxy.api.messages import MAX_STATUS
from cc_proxy.api.status import LONGEST_TEXT, MOST_LISTED, MOST_USERS, MOST_VMS, shorten
from cc_proxy.continuity.cells import State
from cc_proxy.linux.credentials import ROOT, Credentials
from cc_proxy.proxy.clients import status
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.states import FailedVm, Life
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import LiveSettings, Settings
from tests.proxy.support import Rig, frames_of
from tests.wire.support import WAIT, frame


class ListedRegistry:
    """A registry that is a list."""

    def __init__(self, *vms: Vm, failed: tuple[FailedVm, ...] = ()) -> None:
        self._vms = vms
        self._failed = failed

    def spooled(self, client: Credentials) -> int:
        return 0

    def user_status(self, client: Credentials) -> list[UserStatus]:
        return []

    def vms_of(self, client: Credentials) -> list[Vm]:
        return list(self._vms)

    def failed(self, client: Credentials) -> list[FailedVm]:
        return list(self._failed)


def describe(registry: ListedRegistry, *attached: Vm | None) -> Status:
    return status.describe(
        status.About(lambda: "/settings"), cast(Registry, registry), Credentials.own(), attached
    )


class VmOfRig:
    """A VM that is up, with a rig's pump and control channel."""

    owner = ROOT

    def __init__(self, rig: Rig, container_id: str) -> None:
        self.container_id = container_id
        self.life = Life()
        self.life.move(State.UP)
        self.created = time.monotonic()
        self.control = rig.control
        self.describe = rig.pump.describe


def vm_of(rig: Rig, name: str = "web") -> Vm:
    return cast(Vm, VmOfRig(rig, name))


@contextlib.contextmanager
def busy(space: SpoolSpace, release: threading.Event) -> Iterator[Rig]:
    """A pump that is at work until it is released."""
    at_work = threading.Event()

    @contextlib.contextmanager
    def turn(_large: bool) -> Iterator[None]:
        at_work.set()
        assert release.wait(WAIT)
        yield

    with Rig(space, one_at_a_time=turn) as rig:
        try:
            rig.pump.probe()
            assert at_work.wait(WAIT)
            yield rig
        finally:
            release.set()


def test_pump_that_is_stuck_is_said_to_be_and_holds_up_no_other(rig: Rig, space: SpoolSpace) -> None:
    release = threading.Event()
    with busy(space, release) as other:
        stuck, well = vm_of(other, "a"), vm_of(rig, "b")
        first, second = describe(ListedRegistry(stuck, well), stuck, None, stuck).vms
        release.set()
        other.wait_for_turn()  # it answers nobody now, and lives
    assert (first.id, first.clients, first.answers, first.streams) == ("a", 2, False, None)
    assert (second.id, second.clients, second.answers) == ("b", 0, True)
    assert second.streams


def test_all_pumps_are_asked_before_any_is_waited_for(space: SpoolSpace) -> None:
    """The first can only answer once the last was asked."""
    release, asked = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def turn(_large: bool) -> Iterator[None]:
        if asked.is_set():
            release.set()
        yield

    with busy(space, release) as first, Rig(space, one_at_a_time=turn) as last:
        last.wait_for_turn()
        asked.set()
        vms = describe(ListedRegistry(vm_of(last, "b"), vm_of(first, "a"))).vms
    assert [(vm.id, vm.answers) for vm in vms] == [("a", True), ("b", True)]
    assert all(vm.streams for vm in vms)


def test_pump_that_has_ended_is_not_said_to_be_stuck(rig: Rig) -> None:
    rig.pump.abort()
    rig.wait_ended()
    (vm,) = describe(ListedRegistry(vm_of(rig))).vms
    assert (vm.answers, vm.streams) == (True, None)


def test_vm_that_has_no_pump_yet(space: SpoolSpace) -> None:
    (vm,) = describe(
        ListedRegistry(Vm("new", ROOT, LiveSettings(Settings()), space, lambda vm, state: None))
    ).vms
    assert (vm.state, vm.answers, vm.streams, vm.unanswered) == ("starting", True, None, 0)


def test_lists_are_bounded_and_totals_are_not(rig: Rig) -> None:
    streams = [rig.open(1, buffer=4096) for _ in range(MOST_LISTED + 3)]
    for stream in streams:
        rig.io.sendall(b"".join(frame(stream.base, bytes(10_000)) for _ in range(30)))
    rig.settle()
    answer = rig.streams()
    assert (answer.sessions, answer.waiting_sessions) == (len(streams), len(streams))
    assert len(answer.waiting) == MOST_LISTED
    assert answer.spooled + answer.pending > sum(stream.spooled for stream in answer.waiting)


def test_stdin_the_vm_does_not_take(space: SpoolSpace) -> None:
    with Rig(space, io_buffer=4096) as rig:
        stream = rig.open(1)
        sent = 0
        while not rig.streams().stdin_held:
            stream.sock.sendall(frame(stream.base, bytes(1000)))
            sent += 1
        answer = rig.streams()
        assert answer.stdin_held > 0
        assert answer.stdin_stalled > 0
        assert 0 < answer.traffic.frames_to_vm <= sent


def test_frames_are_counted_in_both_directions(rig: Rig) -> None:
    stream = rig.open(1)
    rig.io.sendall(b"".join(frame(stream.base, bytes(64)) for _ in range(300)) + frame(77, b"stray"))
    stream.sock.sendall(frame(stream.base, b"a") + frame(stream.base, bytes(10_000)))
    rig.wait(lambda streams: streams.traffic.frames_to_clients == 300, "all frames up")
    rig.wait(lambda streams: streams.traffic.frames_to_vm == 4, "all frames down")
    taken = b""
    while len(taken) < 13 + 10_000 + 3 * 12:
        taken += rig.io.recv(65_536)
    frames = frames_of(taken)
    traffic = rig.streams().traffic
    assert (traffic.frames_to_vm, traffic.bytes_to_vm) == (len(frames), len(taken)), "as the agent gets them"


#: As long as numbers get in JSON.
BIG, LONG_AGO, LAST_UID = 2**60, 1e9 / 7, 2**32 - 2


def largest_streams() -> Streams:
    waiting = WaitingStream(
        stream=BIG,
        pid=2**22,
        uid=LAST_UID,
        spooled=BIG,
        pending=BIG,
        idle=LONG_AGO,
        holds_vm=False,
        reason="the spool is full " * 5,
    )
    return Streams(
        sessions=BIG,
        traffic=Traffic(*[BIG] * len(Traffic.__struct_fields__)),
        paused=False,
        waiting=[waiting] * MOST_LISTED,
        waiting_sessions=BIG,
        spooled=BIG,
        pending=BIG,
        stdin_held=BIG,
        stdin_stalled=LONG_AGO,
        stdin_unacknowledged=BIG,
    )


def largest_vm(error: LastError) -> VmStatus:
    return VmStatus(
        id=error.text,
        uid=LAST_UID,
        state="starting",
        age=LONG_AGO,
        clients=BIG,
        streams=largest_streams(),
        answers=False,
        commands=[WaitingCommand(name="restartcontainer", age=LONG_AGO)] * MOST_LISTED,
        waiting_commands=BIG,
        unanswered=BIG,
        last_error=error,
    )


def test_the_largest_status_there_is_fits() -> None:
    error = LastError(text=shorten("\0" * 10_000), age=LONG_AGO)
    assert len(error.text) == LONGEST_TEXT
    user = UserStatus(uid=LAST_UID, connections=BIG, vms=BIG, sessions=BIG, commands=BIG, spooled=BIG)
    whole = Status(
        version="1",
        pid=1,
        uptime=1.0,
        settings_file="/" * 4096,
        log_level="console",
        connections=BIG,
        users=[user] * MOST_USERS,
        spooled=BIG,
        vms=[largest_vm(error)] * MOST_VMS,
        vm_count=BIG,
        ended=[EndedVm(id=error.text, error=error)] * 32,
    )
    assert len(msgspec.json.encode(whole)) < MAX_STATUS - 100
