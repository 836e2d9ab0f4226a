"""Errors that nobody expected: each is logged once, counted, costs what it may, and gives back the rest."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from cc_proxy.api.payloads import Hello
from cc_proxy.continuity.cells import State
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import ControlChannel
from cc_proxy.linux.credentials import ROOT, Credentials
from cc_proxy.log import faults
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.log.writing import Logging
from cc_proxy.proxy.clients import connection as connection_module
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.streams import channel as channel_module
from cc_proxy.proxy.streams.output import Output
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.users import User
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import LiveSettings, Settings
from tests.connector import CONNECTOR
from tests.faults import UNEXPECTED, broken, once
from tests.proxy.conftest import Logged
from tests.proxy.house import UNKNOWN, House
from tests.proxy.support import DIALER, Rig, new_user, open_fds, pair, read_to_end, spool_files
from tests.shortages import no_threads
from tests.wire.support import (
    READY,
    WAIT,
    FakeVm,
    Stream,
    at_end,
    command,
    frame,
    in_background,
    request,
    wait_until,
)

SMALL = 4_096


class Counted:
    """How often each event has been counted since the test began."""

    def __init__(self) -> None:
        self._before = Counter(faults.counts())

    def __call__(self) -> dict[str, int]:
        return dict(Counter(faults.counts()) - self._before)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def check_said_once(logged: Logged, counted: Counted, event: str) -> None:
    (record,) = (record for record in logged.records if record.levelno >= logging.ERROR)
    assert record.getMessage() == event
    assert record.exc_info
    assert record.exc_info[0] is KeyError
    assert counted() == {event: 1}


# Connections ----------------------------------------------------------------------------------------------


def asks(house: House) -> None:
    client = house.connect()
    client.send(request("x"))
    assert client.receive() == UNKNOWN


@pytest.mark.parametrize("step", ["get_request", "service_actions"])
def test_accepting_goes_on(house: House, logged: Logged, counted: Counted, step: str) -> None:
    asks(house)
    with broken(Server, step, when=once()) as failed:
        # One may still have been accepted with the first, in the same step.
        for _ in range(3):
            asks(house)
        assert failed.wait(WAIT)
    check_said_once(logged, counted, "accepting connections failed")
    assert house.stop()


def test_accepting_that_fails_all_the_time_ends_when_it_is_told_to(house: House, counted: Counted) -> None:
    with broken(Server, "service_actions"):
        wait_until(lambda: counted().get("accepting connections failed", 0) > 2, "it is tried over and over")
        assert house.stop()


def test_thread_that_cannot_even_be_made_costs_its_connection(
    house: House, logged: Logged, counted: Counted
) -> None:
    with broken(threading, "Thread", when=once()) as failed:
        client = house.connect()
        client.send(request("hyper", {"hyperName": "ping"}))
        assert at_end(client.sock)
        assert failed.is_set()
    asks(house)
    check_said_once(logged, counted, "connection failed")


def test_connection_that_fails_before_it_is_served_costs_none_of_those_that_came_with_it(
    house: House, logged: Logged, counted: Counted
) -> None:
    with broken(User, "note_connection", when=once()) as failed:
        first = house.connect()
        assert failed.wait(WAIT)
        others = [house.connect() for _ in range(3)]
    assert at_end(first.sock)
    for client in others:
        assert client.ask("x") == UNKNOWN
    check_said_once(logged, counted, "connection failed")


def test_refusal_that_fails_too_costs_its_connection_alone(
    house: House, logged: Logged, counted: Counted
) -> None:
    """As when there is no memory, be it for a thread or for saying so."""
    client = house.connect()
    with no_threads(), broken(connection_module, "failure"):
        client.send(request("hyper", {"hyperName": "ping"}))
        assert at_end(client.sock)
    asks(house)
    check_said_once(logged, counted, "connection failed")
    assert len(house.server.roster) == 1


def test_connection_that_cannot_be_noted_down_does_not_count(
    house: House, monkeypatch: pytest.MonkeyPatch, logged: Logged, counted: Counted
) -> None:
    class Full(dict[object, object]):
        def __setitem__(self, _key: object, _value: object) -> None:
            raise UNEXPECTED

    with monkeypatch.context() as patch:
        patch.setattr(house.server.roster, "_charges", Full())
        assert at_end(house.connect().sock)
    asks(house)
    assert house.has("connections") == 1
    check_said_once(logged, counted, "connection failed")


def test_error_that_cannot_even_be_logged_leaves_nothing_open(house: House, counted: Counted) -> None:
    with broken(User, "note_connection"), broken(Server, "handle_error", when=once()) as failed:
        assert at_end(house.connect().sock)
        assert failed.is_set()
    asks(house)
    assert counted() == {"connection failed": 1}, "said once by whoever could"
    assert len(house.server.roster) == 1


@pytest.mark.parametrize("own", [True, False], ids=["own socket", "inherited"])
def test_connections_that_were_accepted_are_served_though_the_end_comes_with_an_error(
    tmp_sock_dir: Path, own: bool
) -> None:
    house = House(tmp_sock_dir, own=own)
    with broken(Server, "service_actions"):
        client = house.connect()
        client.send(request("x"))
        wait_until(lambda: len(house.server.roster) == 1, "it is accepted")
        assert house.stop()
    assert client.receive() == UNKNOWN
    house.close()


def test_error_with_the_last_connections_does_not_keep_the_daemon_from_its_end(
    house: House, logged: Logged, counted: Counted
) -> None:
    with (
        broken(Server, "get_request", BlockingIOError()),  # the accept thread does not get to them
        broken(Credentials, "of_peer", when=once()),
    ):
        first, second = house.connect(), house.connect()
        for client in (first, second):
            client.send(request("x"))
        assert house.stop()
    assert at_end(first.sock)
    assert second.receive() == UNKNOWN
    check_said_once(logged, counted, "connection failed")


# Hello ----------------------------------------------------------------------------------------------------


def hello_of(vm: FakeVm) -> Hello:
    return Hello("pod", str(vm.ctl_path), str(vm.io_path))


def boot(vm: FakeVm) -> None:
    vm.accept()
    with suppress(OSError):  # gone already
        vm.say(READY)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ControlLink, "wait_until_up"),
        (Console, "open"),
        (channel_module, "Output"),
        (threading.Thread, "start"),
        (logging.Logger, "info"),  # the VM is up by then
    ],
)
def test_hello_that_fails_gives_everything_back(tmp_sock_dir: Path, owner: object, name: str) -> None:
    registry = Registry(LiveSettings(Settings()), CONNECTOR)
    before = set(open_fds())
    with closing(FakeVm(tmp_sock_dir, "vm")) as vm, in_background(partial(boot, vm)):
        with broken(owner, name), pytest.raises(KeyError):
            registry.register(hello_of(vm), Credentials.own())
        assert registry.vms() == []
    wait_until(lambda: set(open_fds()) <= before, "fds are given back")
    with closing(FakeVm(tmp_sock_dir, "again")) as vm, in_background(partial(boot, vm)):
        up = registry.register(hello_of(vm), Credentials.own())
        assert up.life.state is State.UP
        up.abort()
        assert up.join(WAIT)


# The control channel --------------------------------------------------------------------------------------


def test_control_channel_that_fails_costs_its_vm(
    tmp_sock_dir: Path, space: SpoolSpace, logged: Logged, counted: Counted
) -> None:
    """What it was in the middle of nobody knows. Who asked is answered, and so is who waits for the lock."""
    states: list[State] = []
    vm = Vm("pod", ROOT, LiveSettings(Settings()), space, lambda vm, state: states.append(state))
    agent = FakeVm(tmp_sock_dir, "vm")
    with in_background(partial(boot, agent)):
        vm.start(hello_of(agent), DIALER, new_user())
    _, stream = vm.open_session(1, new_user())
    wrong = r"^VM gone: internal error in its control channel$"
    with broken(ControlChannel, "send"), pytest.raises(VmError, match=wrong):
        vm.command(Code.PING, b"{}")
    check_said_once(logged, counted, "control channel failed")
    with pytest.raises(VmError, match="VM gone"):
        vm.command(Code.PING, b"{}")
    stream.settimeout(WAIT)
    assert at_end(stream)
    stream.close()
    assert agent.is_hung_up()
    assert vm.join(WAIT)
    assert states == [State.UP, State.LOST, State.GONE]
    agent.close()


# Pumps ----------------------------------------------------------------------------------------------------


def numbered(seq: int, count: int, size: int = 1_000) -> bytes:
    return b"".join(frame(seq, number.to_bytes(4, "big") * (size // 4)) for number in range(count))


def test_what_had_arrived_is_still_delivered(
    rig: Rig, logged: Logged, counted: Counted, tmp_path: Path
) -> None:
    """What waits in the spool, what has just been read, and what was still in the socket."""
    slow, idle = rig.open(buffer=SMALL), rig.open()
    first, rest = numbered(slow.base, 100), numbered(slow.base, 50) + frame(idle.base, b"last")
    rig.io.sendall(first)
    rig.wait(lambda streams: streams.spooled > 0, "output is spooled")

    def there_is_more(_: ControlLink) -> bool:
        rig.io.sendall(rest)
        return True

    with broken(ControlLink, "read", when=there_is_more):
        rig.ctl.sendall(command(23))
        assert idle.read_frame().payload == b"last"
        assert at_end(idle.sock)
    assert read_to_end(slow.sock) == first + numbered(slow.base, 50)
    rig.wait_ended()
    assert rig.owner.causes == ["internal error in its I/O pump"]
    check_said_once(logged, counted, "I/O pump failed")
    assert (rig.space.used, spool_files(tmp_path)) == (0, 0)


def peek(sock: socket.socket) -> bytes:
    return sock.recv(65_536, socket.MSG_PEEK)


def is_of(stream: Stream) -> Callable[..., bool]:
    """Whether a session is that of a client's stream."""
    return lambda session, *_: session.seqs.start == stream.base


@pytest.mark.parametrize("which", [0, 1, 2])
def test_delivery_that_fails_for_one_is_whole_for_the_others(
    rig: Rig, logged: Logged, counted: Counted, which: int
) -> None:
    """None twice, none with a gap; the one itself has what came before."""
    streams = [rig.open() for _ in range(3)]
    before = [numbered(stream.base, 3) for stream in streams]
    rig.io.sendall(b"".join(before))
    # Its mail is opened before what it has read is delivered, so an answer of the pump's would not do.
    wait_until(lambda: [peek(stream.sock) for stream in streams] == before, "all is delivered")
    after = [numbered(stream.base, 7) for stream in streams]
    with broken(Session, "deliver", when=is_of(streams[which])):
        rig.io.sendall(b"".join(after))
        for stream, first, second in zip(streams, before, after, strict=True):
            assert read_to_end(stream.sock) == (first if stream is streams[which] else first + second)
    rig.wait_ended()
    check_said_once(logged, counted, "I/O pump failed")


def test_client_whose_output_cannot_be_flushed_takes_nothing_from_the_others(
    rig: Rig, logged: Logged, counted: Counted, tmp_path: Path
) -> None:
    streams = [rig.open(buffer=SMALL) for _ in range(2)]
    sent = [numbered(stream.base, 100) for stream in streams]
    rig.io.sendall(b"".join(sent))
    rig.wait(lambda streams: len([one for one in streams.waiting if one.spooled]) == 2, "both wait")
    with broken(Session, "flush", when=is_of(streams[0])):
        got = read_to_end(streams[0].sock)
        assert sent[0].startswith(got)
        assert len(got) < len(sent[0])
        assert read_to_end(streams[1].sock) == sent[1]
    rig.wait_ended()
    check_said_once(logged, counted, "I/O pump failed")
    assert (rig.space.used, spool_files(tmp_path)) == (0, 0)


def test_error_at_the_very_end_too_leaves_nothing_open(rig: Rig, counted: Counted) -> None:
    stream = rig.open()
    rig.wait_for_turn()
    with broken(Output, "read_rest"), broken(Output, "read"):
        rig.io.sendall(frame(stream.base, b"x"))
        assert at_end(stream.sock)
        assert at_end(rig.io)
        rig.wait_ended()
    assert counted() == {"I/O pump failed": 2}


def test_console_that_fails_costs_nothing_but_the_console(
    space: SpoolSpace, logged: Logged, counted: Counted
) -> None:
    logger.setLevel(CONSOLE)
    near, far = pair()
    near.setblocking(False)
    with far, Rig(space, console=Console("vm", near)) as rig:
        stream = rig.open()
        with broken(Console, "read"):
            far.sendall(b"a line\n")
            with suppress(ConnectionResetError):  # nobody read the line
                assert far.recv(1) == b""
        rig.io.sendall(frame(stream.base, b"out"))
        assert stream.read_frame().payload == b"out"
        check_said_once(logged, counted, "console failed")
        assert not rig.owner.causes


def test_question_that_fails_is_no_error_of_the_pump(rig: Rig) -> None:
    with broken(channel_module, "describe_streams"), pytest.raises(KeyError):
        rig.streams()
    assert not rig.owner.causes


# The log --------------------------------------------------------------------------------------------------


def test_line_that_cannot_be_made_is_said_and_the_next_one_is_written(counted: Counted) -> None:
    stream = io.StringIO()
    before = logger.level, logger.propagate, logging.raiseExceptions
    log = Logging("info", "json", stream)
    log.start()
    try:
        logger.info("bad %d", "not a number")
        logger.info("good")
    finally:
        log.stop()
        logger.level, logger.propagate, logging.raiseExceptions = before
    said, good = map(json.loads, stream.getvalue().splitlines())
    assert (said["message"], said["event"], said["level"]) == ("log line failed", "bad %d", "ERROR")
    assert "TypeError" in said["exc_info"]
    assert (good["message"], good["lost_before"]) == ("good", 1)
    assert counted() == {"log line failed": 1}
