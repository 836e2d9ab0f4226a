"""Requests as texts, replies as bytes: the table of errors, and errors that fit every client."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import cast

import msgspec
import pytest

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.payloads import AllocateIoResult, Hello
from cc_proxy.continuity.cells import State
from cc_proxy.hyperstart.codes import FROM_AGENT, Code
from cc_proxy.hyperstart.control import ControlMessage
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers, Reply, failure, success
from cc_proxy.proxy.users import User
from cc_proxy.proxy.vms.registry import Registry, RegistryError
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import Limits, LiveSettings, Settings
from tests.proxy.conftest import Logged
from tests.proxy.support import new_user

OK = b'{"success":true}'
VERSIONED = b'{"success":true,"data":{"version":1}}'


class FakeVm:
    """A VM that does what it is told and notes it."""

    def __init__(self, container_id: str) -> None:
        self.container_id = container_id
        self.owner = os.geteuid()
        self.state = State.UP
        self.commands: list[tuple[Code, bytes]] = []
        self.refuses: str | None = None
        self.next_seq = 1

    def command(self, name: Code, payload: bytes, client: int) -> ControlMessage:
        if self.refuses is not None:
            raise VmError(self.refuses)
        self.commands.append((name, payload))
        return ControlMessage(Code.ACK)

    def open_session(self, streams: int, user: User, pid: int) -> tuple[int, socket.socket]:
        if self.refuses is not None:
            raise VmError(self.refuses)
        base = self.next_seq
        self.next_seq += streams
        near, far = socket.socketpair()
        near.close()
        return base, far


class FakeRegistry:
    """Knows those that said hello; of the rest it says what it is told to."""

    def __init__(self) -> None:
        self.vms: dict[str, FakeVm] = {}
        self.hellos: list[Hello] = []
        self.error: Exception | None = None
        self.is_here: object = None

    def register(self, hello: Hello, client: Credentials, is_here: object, number: int) -> FakeVm:
        self.is_here = is_here
        if self.error:
            raise self.error
        self.hellos.append(hello)
        return self.vms.setdefault(hello.container_id, FakeVm(hello.container_id))

    def get(self, container_id: str, client: Credentials) -> FakeVm:
        try:
            return self.vms[container_id]
        except KeyError:
            raise RegistryError(f"unknown containerID: {container_id}") from None

    def unregister(self, container_id: str, client: Credentials) -> None:
        self.get(container_id, client)
        del self.vms[container_id]


class Desk:
    """Handlers, and one client of them."""

    def __init__(self) -> None:
        self.registry = FakeRegistry()
        self.handlers = Handlers(cast(Registry, self.registry), LiveSettings(Settings()))
        self.client = ClientInfo(7, Credentials.own(), new_user())
        self.vm = FakeVm("pod")
        self.registry.vms["pod"] = self.vm
        self._passed: list[socket.socket] = []

    def reply(self, text: str | bytes) -> Reply:
        reply = self.handlers.answer(self.client, text.encode() if isinstance(text, str) else text)
        assert reply.message[:8] == (len(reply.message) - 8).to_bytes(4, "big") + bytes(4)
        if reply.passed:
            self._passed.append(reply.passed)
        return reply

    def ask(self, name: str, data: object = None) -> bytes:
        request = {"id": name} if data is None else {"id": name, "data": data}
        return self.reply(json.dumps(request)).message[8:]

    def attach(self) -> None:
        self.client.vm = cast(Vm, self.vm)

    def attached_to(self) -> object:
        return self.client.vm

    def close(self) -> None:
        for sock in self._passed:
            sock.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def refused(text: str) -> bytes:
    return json.dumps({"success": False, "error": text}, separators=(",", ":"), ensure_ascii=False).encode()


HELLO = {"containerId": "new", "ctlSerial": "/ctl", "ioSerial": "/io"}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("", None, "no 'id' field in request"),
        ("health", None, "no payload named 'health'"),
        ("Hello", HELLO, "no payload named 'Hello'"),
        ("hello", None, "malformed hello command"),
        ("hello", HELLO | {"containerId": ""}, "malformed hello command"),
        ("hello", HELLO | {"ctlSerial": ""}, "malformed hello command"),
        ("hello", HELLO | {"ioSerial": ""}, "malformed hello command"),
        ("hello", HELLO | {"ioSerial": 1}, "hello: Expected `str`, got `int` - at `$.ioSerial`"),
        ("attach", {"containerId": "who"}, "unknown containerID: who"),
        ("attach", None, "unknown containerID: "),
        ("attach", [], "attach: Expected `object`, got `array`"),
        ("bye", {"containerId": "who"}, "unknown containerID: who"),
        ("allocateIO", None, "asking for unexpected number of streams (0)"),
        ("allocateIO", {"nStreams": 3}, "asking for unexpected number of streams (3)"),
        ("allocateIO", {"nStreams": -1}, "asking for unexpected number of streams (-1)"),
        ("allocateIO", {"nStreams": "1"}, "allocateIO: Expected `int`, got `str` - at `$.nStreams`"),
    ],
)
def test_refusals_change_nothing(desk: Desk, attached: bool, name: str, data: object, error: str) -> None:
    if attached:
        desk.attach()
    before = desk.client.vm
    assert desk.ask(name, data) == refused(error)
    assert desk.client.vm is before
    assert desk.registry.hellos == []
    assert (desk.vm.commands, desk.vm.next_seq) == ([], 1)
    assert list(desk.registry.vms) == ["pod"]


@pytest.mark.parametrize("name", ["allocateIO", "hyper"])
def test_who_is_not_attached(desk: Desk, name: str) -> None:
    data = {"nStreams": 1} if name == "allocateIO" else {"hyperName": "ping"}
    assert desk.ask(name, data) == refused("client not attached to a vm")


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("hello", True),
        ("hyper", True),
        ("status", True),
        ("attach", False),
        ("bye", False),
        ("allocateIO", False),
        ("logLevel", False),
        ("nonsense", False),
        ("", False),
    ],
)
def test_only_what_may_wait_is_not_answered_at_once(desk: Desk, name: str, waits: bool) -> None:
    reply = desk.handlers.answer_at_once(desk.client, json.dumps({"id": name}).encode())
    assert (reply is None) == waits
    assert desk.registry.hellos == [], "nothing is done then"


@pytest.mark.parametrize("name", ["nonsense", "", "PING", *(code.hyper_name for code in FROM_AGENT)])
def test_command_nobody_may_send(desk: Desk, name: str) -> None:
    desk.attach()
    assert desk.ask("hyper", {"hyperName": name}) == refused(f"unknown command '{name}'")
    assert desk.vm.commands == []


def test_what_the_vm_says_is_what_the_client_is_told(desk: Desk) -> None:
    desk.attach()
    desk.vm.refuses = "VM gone: for a reason"
    assert desk.ask("hyper", {"hyperName": "ping"}) == refused("VM gone: for a reason")
    assert desk.ask("allocateIO", {"nStreams": 1}) == refused("VM gone: for a reason")
    desk.registry.error = VmError("no READY from the VM in 30 s")
    assert desk.ask("hello", HELLO) == refused("no READY from the VM in 30 s")
    desk.registry.error = RegistryError("new: container already registered")
    assert desk.ask("hello", HELLO) == refused("new: container already registered")
    assert desk.attached_to() is desk.vm


def test_command_beyond_the_limit_is_refused_and_logged(desk: Desk, logged: Logged) -> None:
    desk.client.user = new_user(Limits(commands=1))
    desk.attach()
    waiting = desk.client.user.charge("commands")
    error = "the limit of 1 commands that wait is reached"
    assert desk.ask("hyper", {"hyperName": "ping"}) == refused(error)
    assert desk.vm.commands == []
    who = {"pid": desk.client.who.pid, "uid": desk.client.who.uid}
    assert logged.fields("limit reached") == [{"payload": "hyper", "error": error, **who}]
    waiting.give_back()
    for _ in range(2):
        assert desk.ask("hyper", {"hyperName": "ping"}) == OK, "each is given back when it is done"
    desk.vm.refuses = "VM gone: for a reason"
    for _ in range(2):
        assert desk.ask("hyper", {"hyperName": "ping"}) == refused("VM gone: for a reason")


def test_a_client_and_its_vm(desk: Desk) -> None:
    assert desk.ask("hello", HELLO | {"console": "/console"}) == VERSIONED
    assert desk.registry.hellos == [Hello("new", "/ctl", "/io", "/console")]
    assert desk.attached_to() is desk.registry.vms["new"]
    assert desk.registry.is_here is desk.client.is_here, "it is looked for the VM while its client waits"
    assert desk.ask("attach", {"containerId": "pod"}) == VERSIONED
    assert desk.attached_to() is desk.vm
    reply = desk.reply('{"id":"allocateIO","data":{"nStreams":2}}')
    assert reply.message[8:] == b'{"success":true,"data":{"ioBase":1}}'
    assert reply.passed
    assert desk.ask("allocateIO", {"nStreams": 1}) == b'{"success":true,"data":{"ioBase":3}}'
    assert desk.reply('{"id":"hyper","data":{"hyperName":"ping","data": {"a" : 1.0e1} }}').message[8:] == OK
    assert desk.ask("hyper", {"hyperName": "getversion"}) == OK
    assert desk.vm.commands == [(Code.PING, b'{"a" : 1.0e1}'), (Code.VERSION, b"")]
    assert desk.ask("bye", {"containerId": "new"}) == OK
    assert desk.attached_to() is None, "this client is detached, whichever id it was"
    assert list(desk.registry.vms) == ["pod"]


def test_attaching_to_another_users_vm_is_logged(desk: Desk, logged: Logged) -> None:
    """Its agent sees what it is sent."""
    assert desk.ask("attach", {"containerId": "pod"}) == VERSIONED
    assert logged.fields("attached to another user's VM") == []
    desk.vm.owner = 54_321
    assert desk.ask("attach", {"containerId": "pod"}) == VERSIONED
    (fields,) = logged.fields("attached to another user's VM")
    assert (fields["vm"], fields["owner"], fields["uid"]) == ("pod", 54_321, os.geteuid())


def test_replies_that_are_shared_carry_no_fd(desk: Desk) -> None:
    """The same object answers many: nothing may be hung on to it."""
    assert desk.reply('{"id":"attach","data":{"containerId":"pod"}}').passed is None
    assert desk.reply('{"id":"allocateIO","data":{"nStreams":1}}').passed
    assert desk.reply('{"id":"attach","data":{"containerId":"pod"}}').passed is None
    assert desk.reply('{"id":"hyper","data":{"hyperName":"ping"}}').passed is None


@pytest.mark.parametrize("text", [b"", b"x", b"[]", b'"hello"', b"\xff", b'{"id":"hello"', b"[" * 100_000])
def test_text_that_is_no_object_is_no_request(desk: Desk, text: bytes) -> None:
    with pytest.raises(ProtocolError):
        desk.reply(text)


def test_requests_are_logged_with_their_fields_and_only_if_wanted(desk: Desk, logged: Logged) -> None:
    desk.ask("attach", {"containerId": "pod"})
    desk.ask("x" * 100)
    desk.ask("attach", {"containerId": "y" * 300})
    logger.setLevel(logging.INFO)
    desk.ask("attach", {"containerId": "pod"})
    assert logged.fields("request") == [{"client": 7, "payload": "attach", "vm": "pod"}]
    assert logged.fields("request refused") == [
        {"client": 7, "payload": "x" * 64, "vm": "pod", "error": f"no payload named '{'x' * 100}'"},
        {"client": 7, "payload": "attach", "vm": "pod", "error": f"unknown containerID: {'y' * 179}"},
    ]


# Errors that fit ------------------------------------------------------------------------------------------

OVERHEAD = len('{"success":false,"error":""}')
ROOM = 1024 - OVERHEAD

#: A character, and the bytes it takes in a response.
CHARACTERS = {
    "a": 1,
    "\x7f": 1,
    '"': 2,
    "\\": 2,
    "\n": 2,
    "é": 2,
    "€": 3,
    "😀": 4,
    "\x00": 6,
    "\x1f": 6,
}


@pytest.mark.parametrize("character", CHARACTERS)
def test_error_of_about_1024_bytes(character: str) -> None:
    """It is shortened by as much as it must be, at a character, and not at all if it fits."""
    size = CHARACTERS[character]
    for excess in range(-4, 8):
        room = ROOM + excess
        everywhere = character * (room // size) + "a" * (room % size)
        rest = "a" * (room - size)
        for text in (everywhere, rest + character, character + rest):
            check_failure(text, fits=excess <= 0)


@pytest.mark.parametrize("character", CHARACTERS)
def test_error_of_any_length(character: str) -> None:
    for count in (2_000, 100_000):
        check_failure(character * count, fits=False)


def check_failure(text: str, *, fits: bool) -> None:
    reply = failure(text)
    assert reply.passed is None
    encoded = reply.message[8:]
    assert reply.message[:8] == len(encoded).to_bytes(4, "big") + bytes(4)
    assert len(encoded) <= 1024
    answer = msgspec.json.decode(encoded)
    assert answer["success"] is False
    if fits:
        assert answer["error"] == text
        return
    kept = answer["error"].removesuffix("…")
    assert answer["error"] == kept + "…"
    assert text.startswith(kept)
    longer = refused_size(text[: len(kept) + 1] + "…")
    assert longer > 1024, "no longer one would have fitted"


def refused_size(text: str) -> int:
    return OVERHEAD + sum(CHARACTERS.get(character, len(character.encode())) for character in text)


def test_error_is_never_left_out_because_it_is_short() -> None:
    assert failure("x").message[8:] == b'{"success":false,"error":"x"}'


def test_results_are_compact() -> None:
    assert success(AllocateIoResult(1)).message[8:] == b'{"success":true,"data":{"ioBase":1}}'
