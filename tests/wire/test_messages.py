"""Client messages: the header, the text, and whatever else may come (docs/protocol.md, 1)."""

from __future__ import annotations

import random
import select
import socket
import struct
from contextlib import suppress

import pytest

from tests.wire.daemon import Pod, Wire
from tests.wire.support import (
    MIB,
    OK,
    PING,
    READY,
    VERSIONED,
    WAIT,
    error_of,
    in_pieces,
    message,
    refused,
    request,
)

NOBODY = refused("no payload named 'x'")


def padded(size: int) -> bytes:
    """A request of `size` bytes of text."""
    start, end = b'{"id":"x","pad":"', b'"}'
    return start + b"a" * (size - len(start) - len(end)) + end


def test_response_header_is_the_big_endian_length_and_a_reserved_zero(wire: Wire) -> None:
    client = wire.client()
    client.send(request("x"))
    header = client.sock.recv(8)
    assert header == struct.pack(">II", len(NOBODY), 0)
    assert client.sock.recv(2000) == NOBODY


def test_header_and_text_go_out_in_one_write(wire: Wire) -> None:
    """Two writes would be seen apart sooner or later by who waits in `read`."""
    client = wire.client()
    expected = message(NOBODY)
    for _ in range(200):
        client.send(request("x"))
        assert client.sock.recv(2000) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_requests_arrive_in_any_pieces(wire: Wire, size: int) -> None:
    client = wire.client()
    for piece in in_pieces(request("x") * 2, size):
        client.send(piece)
    assert [client.receive(), client.receive()] == [NOBODY] * 2


def test_header_in_pieces_does_not_close_the_connection(wire: Wire) -> None:
    client = wire.client()
    whole = request("x")
    for cut in range(1, 9):
        client.send(whole[:cut])
        assert wire.client().ask("x") == NOBODY  # served after the first piece was there
        client.send(whole[cut:])
        assert client.receive() == NOBODY


def test_pipelined_requests_get_one_response_each_in_order(wire: Wire) -> None:
    client = wire.client()
    names = [f"n{number}" for number in range(500)]
    client.send(b"".join(map(request, names)))
    assert [client.receive() for _ in names] == [refused(f"no payload named '{name}'") for name in names]


def test_pipelined_requests_in_random_pieces(wire: Wire) -> None:
    client = wire.client()
    pod = wire.pod()
    rng = random.Random(7)
    attach = request("attach", {"containerId": pod.container})
    kinds = [rng.choice([(request("x"), NOBODY), (attach, VERSIONED)]) for _ in range(60)]
    rest = b"".join(sent for sent, _ in kinds)
    while rest:
        cut = rng.randint(1, 40)
        client.send(rest[:cut])
        rest = rest[cut:]
    assert [client.receive() for _ in kinds] == [expected for _, expected in kinds]


def test_responses_keep_their_order_behind_a_hello_that_waits(wire: Wire) -> None:
    client, vm = wire.client(), wire.vm()
    container = wire.new_id()
    client.hello(container, vm)
    client.send(request("x") + request("attach", {"containerId": container}))
    vm.accept()
    vm.say(READY)
    assert [client.receive() for _ in range(3)] == [VERSIONED, NOBODY, VERSIONED]


def test_text_of_1_mib_is_taken(wire: Wire) -> None:
    client = wire.client()
    client.send(message(padded(MIB)))
    assert client.receive() == NOBODY
    assert client.ask("x") == NOBODY


@pytest.mark.parametrize("length", [MIB + 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
def test_length_over_1_mib_closes_the_connection_and_nothing_is_sent(wire: Wire, length: int) -> None:
    client = wire.client()
    client.send(message(b"", length=length))
    assert client.is_closed_unanswered()


@pytest.mark.parametrize("reserved", [1, 2**31, 2**32 - 1])
def test_reserved_field_not_0_closes_the_connection_and_nothing_is_sent(wire: Wire, reserved: int) -> None:
    client = wire.client()
    client.send(message('{"id":"x"}', reserved=reserved))
    assert client.is_closed_unanswered()


def test_what_was_asked_before_a_protocol_error_is_answered(wire: Wire) -> None:
    client = wire.client()
    client.send(request("x") + message(b"", length=MIB + 1))
    assert client.receive() == NOBODY
    assert client.is_closed_unanswered()


def test_a_protocol_error_ends_no_other_connection(wire: Wire) -> None:
    pod = wire.pod()
    client = wire.client()
    client.send(message("[]"))
    assert client.is_closed_unanswered()
    assert pod.pings()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b" ", id="blank"),
        pytest.param(b"[]", id="array"),
        pytest.param(b'[{"id":"x"}]', id="array of an object"),
        pytest.param(b'"x"', id="string"),
        pytest.param(b"1", id="number"),
        pytest.param(b"null", id="null"),
        pytest.param(b"true", id="true"),
        pytest.param(b"x", id="no JSON"),
        pytest.param(b'{"id":"x"', id="unfinished"),
        pytest.param(b'{"id":"x"}}', id="a bracket too many"),
        pytest.param(b'{"id":"x"}{"id":"x"}', id="two objects"),
        pytest.param(b'{"id":"x",}', id="trailing comma"),
        pytest.param(b"{'id':'x'}", id="single quotes"),
        pytest.param(b'{"id":"x"}\x00', id="trailing NUL"),
        pytest.param(b'\x00{"id":"x"}', id="leading NUL"),
        pytest.param(b'{"id":"x","data":NaN}', id="NaN"),
        pytest.param(b'{"id":"\xff"}', id="invalid UTF-8 in id"),
        pytest.param(b'{"id":"x","y":"\xff"}', id="invalid UTF-8 in an unknown member"),
        pytest.param(b'{"id":"x","\xc3":1}', id="invalid UTF-8 in a name"),
        pytest.param(b'{"id":"x","data":"\xc0\xaf"}', id="overlong UTF-8"),
        pytest.param(b'{"id":"x","data":"\xed\xa0\x80"}', id="surrogate in UTF-8"),
        pytest.param('{"id":"x"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b"[" * 200_000, id="200,000 brackets"),
        pytest.param(b"[" * 200_000 + b"]" * 200_000, id="200,000 balanced brackets"),
        pytest.param(b'{"id":' * 100_000, id="100,000 objects"),
        pytest.param(b'{"id":"x","y":' + b"[" * 200_000, id="200,000 brackets in an unknown member"),
        pytest.param(b"\x00" * MIB, id="1 MiB of zeros"),
    ],
)
def test_text_that_is_not_a_json_object_closes_the_connection(wire: Wire, text: bytes) -> None:
    client = wire.client()
    client.send(message(text))
    assert client.is_closed_unanswered()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b'"\xff"', id="invalid UTF-8"),
        pytest.param(b'{"a":"\xc3"}', id="unfinished UTF-8"),
        pytest.param(b'{"\xf8\x88\x80\x80\x80":1}', id="invalid UTF-8 in a name"),
        pytest.param(b'"\xed\xbf\xbf"', id="surrogate in UTF-8"),
        pytest.param(b'"a\nb"', id="raw control character"),
        pytest.param(rb'"\x"', id="unknown escape"),
        pytest.param(rb'"\u12g4"', id="bad hexadecimal escape"),
        pytest.param(b"01", id="leading zero"),
        pytest.param(b"1.", id="no digits after the point"),
        pytest.param(b"+1", id="plus sign"),
        pytest.param(b"-", id="lone minus"),
        pytest.param(b"1e", id="no exponent"),
        pytest.param(b"tru", id="cut literal"),
        pytest.param(b"[1,]", id="trailing comma"),
        pytest.param(b'{"a" 1}', id="no colon"),
        pytest.param(b"{1:1}", id="name that is no string"),
        pytest.param(b"[}", id="mismatched brackets"),
        pytest.param(b"[" * 200_000, id="200,000 brackets"),
        pytest.param(b'{"a":' * 100_000, id="100,000 objects"),
        pytest.param(b"[" * 200_000 + b"]" * 199_999, id="one bracket short"),
    ],
)
def test_hyper_data_that_is_not_json_closes_the_connection_and_stays_from_the_vm(
    wire: Wire, value: bytes
) -> None:
    pod = wire.pod()
    client = wire.attached(pod)
    client.send(message(b'{"id":"hyper","data":{"hyperName":"ping","data":' + value + b"}}"))
    assert client.is_closed_unanswered()
    assert pod.pings()  # nothing before it


def fate(pod: Pod) -> bytes:
    """What becomes of the client's one request: the payload the VM got, or an error, or b"" for a close."""
    client = pod.client
    readable, _, _ = select.select([client.sock, pod.vm.ctl], [], [], WAIT)
    if pod.vm.ctl in readable:
        payload = pod.vm.acknowledge().payload
        assert client.receive() == OK
        return payload
    with suppress(ConnectionResetError):
        if client.sock.recv(1, socket.MSG_PEEK):
            return error_of(client.receive()).encode()
    return b""


@pytest.mark.parametrize("depth", [1_000, 4_000, 200_000])
def test_hyper_data_nested_deeply_has_a_clear_outcome_and_harms_nobody(wire: Wire, depth: int) -> None:
    pod = wire.pod()
    other = wire.attached(pod)
    value = "[" * depth + "]" * depth
    pod.client.hyper("ping", value)
    result = fate(pod)
    assert result == value.encode() or len(result) <= 1024
    assert pod.pings(other)


@pytest.mark.parametrize("depth", [1_000, 200_000])
def test_unknown_member_nested_deeply_has_a_clear_outcome_and_harms_nobody(wire: Wire, depth: int) -> None:
    pod = wire.pod()
    other = wire.attached(pod)
    pod.client.send(message(b'{"id":"x","y":' + b"[" * depth + b"]" * depth + b"}"))
    assert len(fate(pod)) <= 1024
    assert pod.pings(other)


def test_nested_brackets_that_commands_may_need_are_forwarded(wire: Wire) -> None:
    pod = wire.pod()
    value = "[" * 150 + "]" * 150
    pod.client.hyper("ping", value)
    assert pod.vm.acknowledge() == (PING, value.encode())
    assert pod.client.receive() == OK
