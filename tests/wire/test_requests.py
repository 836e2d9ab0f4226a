"""What requests hold and what responses look like (docs/protocol.md, 1)."""

from __future__ import annotations

import json
import socket

import pytest

from tests.wire.daemon import Wire
from tests.wire.support import (
    MIB,
    NOT_ATTACHED,
    OK,
    PING,
    READY,
    VERSIONED,
    error_of,
    hello_data,
    message,
    refused,
    request,
)

NO_ID = refused("no 'id' field in request")
NOBODY = refused("no payload named 'x'")


@pytest.mark.parametrize("text", ["{}", '{"data":{}}', '{"ID":"bye"}', ' {\n"data" : null }\t'])
def test_no_id_is_an_error(wire: Wire, text: str) -> None:
    client = wire.client()
    client.send(message(text))
    assert client.receive() == NO_ID
    assert client.ask("x") == NOBODY


@pytest.mark.parametrize(
    "name", ["x", "Hello", "hello ", "health", "allocateio", "connectShim", "a'b", "%s", "{}"]
)
def test_id_nobody_handles_is_an_error(wire: Wire, name: str) -> None:
    assert wire.client().ask(name) == refused(f"no payload named '{name}'")


@pytest.mark.parametrize("name", ['"', "\\", "a\nb", "\x00", "\x7f", "\u00e9", "\u2028", "\U0001f600"])
def test_id_with_special_characters_comes_back_in_the_error(wire: Wire, name: str) -> None:
    assert error_of(wire.client().ask(name)) == f"no payload named '{name}'"


@pytest.mark.parametrize(
    "text",
    [
        r'{"id":"\ud800"}',
        r'{"id":"\udc00\ud800"}',
        r'{"id":"attach","data":{"containerId":"\ud800"}}',
        r'{"id":"hello","data":{"containerId":"a","ctlSerial":"/\ud800","ioSerial":"/\udfff"}}',
    ],
)
def test_half_a_surrogate_pair_has_a_clear_outcome(wire: Wire, text: str) -> None:
    client = wire.client()
    client.send(message(text))
    first = client.sock.recv(1, socket.MSG_PEEK)
    if first:
        error_of(client.receive())
        assert client.ask("x") == NOBODY


def test_number_of_5000_digits_has_a_clear_outcome(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.attached(pod)
    client.send(message('{"id":"allocateIO","data":{"nStreams":%s}}' % ("9" * 5_000)))
    if client.sock.recv(1, socket.MSG_PEEK):
        error_of(client.receive())
    assert pod.open().base == 1


@pytest.mark.parametrize("value", ["1", "null", "true", "[]", "{}", '["hello"]', "1e999"])
def test_id_that_is_no_string_is_an_error(wire: Wire, value: str) -> None:
    client = wire.client()
    client.send(message(f'{{"id":{value}}}'))
    assert "id" in error_of(client.receive())
    assert client.ask("x") == NOBODY


@pytest.mark.parametrize("value", ["1", "true", "[]", '"hello"', "1e999"])
@pytest.mark.parametrize("name", ["hello", "attach", "bye", "allocateIO", "hyper"])
def test_data_that_is_no_object_is_an_error(wire: Wire, name: str, value: str) -> None:
    client = wire.client()
    client.send(message(f'{{"id":"{name}","data":{value}}}'))
    error_of(client.receive())
    assert client.ask("x") == NOBODY


@pytest.mark.parametrize("data", ["", ',"data":{}', ',"data":null'])
@pytest.mark.parametrize("name", ["hello", "attach", "bye", "allocateIO", "hyper"])
def test_data_may_be_absent_but_what_it_should_hold_is_missed(wire: Wire, name: str, data: str) -> None:
    client = wire.client()
    client.send(message(f'{{"id":"{name}"{data}}}'))
    error_of(client.receive())
    assert client.ask("x") == NOBODY


def test_order_of_members_and_blanks_between_them_do_not_matter(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.client()
    client.send(message(f'\r\n{{ "data" : {{ "containerId"\t: "{pod.container}" }} ,\n "id" :"attach" }} '))
    assert client.receive() == VERSIONED


def test_escapes_in_names_are_understood(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.client()
    client.send(message(rf'{{"\u0069d":"att\u0061ch","data":{{"container\u0049d":"{pod.container}"}}}}'))
    assert client.receive() == VERSIONED


def test_unknown_members_are_ignored(wire: Wire) -> None:
    client, vm = wire.client(), wire.vm()
    container = wire.new_id()
    extra = {"zzz": [1, {"id": "bye"}], "version": 7}
    hello = {"id": "hello", "data": hello_data(container, vm) | extra} | extra
    client.send(message(json.dumps(hello)))
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    client.send(message(json.dumps({"id": "attach", "data": {"containerId": container} | extra} | extra)))
    assert client.receive() == VERSIONED
    client.send(message(json.dumps({"id": "hyper", "data": {"hyperName": "ping"} | extra} | extra)))
    assert vm.acknowledge() == (PING, b"")
    assert client.receive() == OK
    client.send(message(json.dumps({"id": "allocateIO", "data": {"nStreams": 1} | extra} | extra)))
    client.receive_io()
    client.send(message(json.dumps({"id": "bye", "data": {"containerId": container} | extra} | extra)))
    assert client.receive() == OK


WRONG_TYPES = [
    (payload, member, value)
    for payload, member, right in [
        ("hello", "containerId", str),
        ("hello", "ctlSerial", str),
        ("hello", "ioSerial", str),
        ("hello", "console", str),
        ("attach", "containerId", str),
        ("bye", "containerId", str),
        ("allocateIO", "nStreams", int),
        ("hyper", "hyperName", str),
    ]
    for value in ([1, 1.5, True, [], ["a"], {}, {"a": 1}] if right is str else ["2", 1.5, True, [], [2], {}])
]


@pytest.mark.parametrize(("payload", "member", "value"), WRONG_TYPES)
def test_wrong_type_is_an_error_that_names_the_member(
    wire: Wire, payload: str, member: str, value: object
) -> None:
    pod = wire.pod()
    other = wire.vm()
    right: dict[str, dict[str, object]] = {
        "hello": hello_data(wire.new_id(), other),
        "attach": {"containerId": pod.container},
        "bye": {"containerId": pod.container},
        "allocateIO": {"nStreams": 2},
        "hyper": {"hyperName": "ping"},
    }
    assert member in error_of(pod.client.ask(payload, right[payload] | {member: value}))
    # And it changed nothing.
    assert other.was_not_dialled()
    assert pod.pings()
    assert pod.open().base == 1
    assert wire.is_registered(pod.container)


@pytest.mark.parametrize(
    ("payload", "data"),
    [
        ("attach", {"containerId": None}),
        ("bye", {"containerId": None}),
        ("allocateIO", {"nStreams": None}),
        ("hyper", {"hyperName": None}),
        ("attach", {"containerid": "a"}),
        ("allocateIO", {"nstreams": 2}),
        ("hyper", {"hypername": "ping"}),
    ],
)
def test_member_that_is_null_or_absent_is_an_error_and_changes_nothing(
    wire: Wire, payload: str, data: dict[str, object]
) -> None:
    pod = wire.pod()
    error_of(pod.client.ask(payload, data))
    assert pod.pings()
    assert pod.open().base == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("x" * (MIB - 100), id="1 MiB"),
        pytest.param("x" * 1_000, id="1,000"),
        pytest.param("\u00e9" * 100_000, id="two bytes each"),
        pytest.param("\U0001f600" * 50_000, id="four bytes each"),
        pytest.param('"' * 100_000, id="quotes"),
        pytest.param("\\" * 100_000, id="backslashes"),
        pytest.param("\x01" * 100_000, id="control characters"),
        pytest.param("a" + "\x01\u00e9" * 10_000, id="mixed"),
    ],
)
def test_response_to_a_long_id_stays_within_1024(wire: Wire, name: str) -> None:
    client = wire.client()
    client.send(message(json.dumps({"id": name}, ensure_ascii=False)))
    assert error_of(client.receive()).startswith("no payload named '" + name[:10])
    assert client.ask("x") == NOBODY


LONG = "\x01\u20ac" * 20_000


@pytest.mark.parametrize(
    ("payload", "data", "start"),
    [
        ("attach", {"containerId": LONG}, "unknown containerID: "),
        ("bye", {"containerId": LONG}, "unknown containerID: "),
        ("hello", {"containerId": LONG, "ctlSerial": LONG, "ioSerial": LONG}, ""),
        ("hello", {"containerId": "a", "ctlSerial": LONG, "ioSerial": LONG, "console": 5}, ""),
        ("hyper", {"hyperName": LONG}, "unknown command '"),
        ("hyper", {"hyperName": "ping", "data": LONG}, "message too long "),
        ("allocateIO", {"nStreams": LONG}, ""),
        ("allocateIO", {"nStreams": 10**4000}, ""),
    ],
)
def test_response_to_each_payload_stays_within_1024(
    wire: Wire, payload: str, data: dict[str, object], start: str
) -> None:
    pod = wire.pod()
    pod.client.send(message(json.dumps({"id": payload, "data": data}, ensure_ascii=False)))
    assert error_of(pod.client.receive()).startswith(start)
    assert pod.pings()


def test_response_to_a_second_hello_with_a_long_id_stays_within_1024(wire: Wire) -> None:
    pod = wire.pod(container="x" * 100_000)
    client = wire.client()
    client.hello(pod.container, wire.vm())
    assert error_of(client.receive()).startswith("xxxx")
    assert client.attach(pod.container) == VERSIONED
    assert client.bye(pod.container) == OK


@pytest.mark.parametrize("payload", ["allocateIO", "hyper"])
def test_payloads_that_need_a_vm_say_so_without_one(wire: Wire, payload: str) -> None:
    data = {"allocateIO": {"nStreams": 1}, "hyper": {"hyperName": "ping"}}[payload]
    assert wire.client().ask(payload, data) == NOT_ATTACHED


def test_requests_of_a_client_that_sends_no_more_are_answered(wire: Wire) -> None:
    """It has shut its side down, as some do to say that this was all."""
    pod = wire.pod()
    client, vm, container = wire.client(), wire.vm(), wire.new_id()
    client.send(request("x") * 20 + request("attach", {"containerId": pod.container}))
    client.hyper("ping")
    client.hello(container, vm)
    client.sock.shutdown(socket.SHUT_WR)
    assert [client.receive() for _ in range(20)] == [NOBODY] * 20
    assert client.receive() == VERSIONED
    pod.vm.acknowledge()
    assert client.receive() == OK
    vm.accept()
    vm.say(READY)
    assert client.receive() == VERSIONED
    assert client.sock.recv(1) == b""
    assert wire.is_registered(container)


def test_last_request_in_pieces_that_never_ends_gets_no_answer(wire: Wire) -> None:
    client = wire.client()
    client.send(request("x") + request("x")[:-1])
    client.sock.shutdown(socket.SHUT_WR)
    assert client.receive() == NOBODY
    assert client.is_closed_unanswered()
