"""What stands in the JSON of requests and responses, byte for byte."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from cc_proxy.api import (
    AllocateIo,
    AllocateIoResult,
    Attach,
    Bye,
    Hello,
    Hyper,
    Payload,
    ProtocolError,
    Request,
    Response,
    Version,
)
from cc_proxy.api.messages import decode, encode


def text(sent: msgspec.Struct) -> bytes:
    """The JSON text of a message."""
    return encode(sent)[8:]


def raw(data: bytes) -> msgspec.Raw:
    """JSON text, as an object that is not the one that stands for "none"."""
    return msgspec.Raw(bytearray(data))


@pytest.mark.parametrize(
    ("payload", "name", "wire"),
    [
        (
            Hello("c", "/ctl", "/io"),
            "hello",
            b'{"containerId":"c","ctlSerial":"/ctl","ioSerial":"/io"}',
        ),
        (
            Hello("c", "/ctl", "/io", "/console"),
            "hello",
            b'{"containerId":"c","ctlSerial":"/ctl","ioSerial":"/io","console":"/console"}',
        ),
        (Attach("c"), "attach", b'{"containerId":"c"}'),
        (Bye("c"), "bye", b'{"containerId":"c"}'),
        (AllocateIo(1), "allocateIO", b'{"nStreams":1}'),
        (AllocateIo(2), "allocateIO", b'{"nStreams":2}'),
        (Hyper("ping"), "hyper", b'{"hyperName":"ping"}'),
        (Hyper("ping", raw(b"{ }")), "hyper", b'{"hyperName":"ping","data":{ }}'),
        (
            Hyper("ping", raw(b'{"a":1.0,"a":"\\u0041"}')),
            "hyper",
            b'{"hyperName":"ping","data":{"a":1.0,"a":"\\u0041"}}',
        ),
        (Hyper("ping", raw(b"null")), "hyper", b'{"hyperName":"ping","data":null}'),
        (Hyper("destroypod", raw(b'""')), "hyper", b'{"hyperName":"destroypod","data":""}'),
    ],
)
def test_each_payload_travels_under_its_name_and_its_members_too(
    payload: Payload, name: str, wire: bytes
) -> None:
    assert name == payload.NAME
    assert text(payload) == wire
    assert text(Request(payload.NAME, raw(wire))) == b'{"id":"%b","data":%b}' % (name.encode(), wire)
    back = decode(wire, type(payload))
    assert text(back) == wire


@pytest.mark.parametrize(
    ("response", "wire"),
    [
        (Response(True), b'{"success":true}'),
        (Response(True, ""), b'{"success":true}'),
        (Response(True, data=raw(b'{"version":1}')), b'{"success":true,"data":{"version":1}}'),
        (Response(False), b'{"success":false}'),
        (Response(False, "no"), b'{"success":false,"error":"no"}'),
        (Response(False, "no", raw(b'{"a":1}')), b'{"success":false,"error":"no","data":{"a":1}}'),
        (Response(False, 'a"\\\n\0é😀'), '{"success":false,"error":"a\\"\\\\\\n\\u0000é😀"}'.encode()),
    ],
)
def test_responses_are_compact_in_this_order_and_leave_out_what_is_empty(
    response: Response, wire: bytes
) -> None:
    assert text(response) == wire


def test_a_text_that_is_empty_without_being_the_default_is_left_out_too() -> None:
    empty = "".join(filter(str.isupper, "abc"))
    assert text(Response(True, empty)) == b'{"success":true}'
    assert (
        text(Hello("c", "/ctl", "/io", empty)) == b'{"containerId":"c","ctlSerial":"/ctl","ioSerial":"/io"}'
    )


@pytest.mark.parametrize(
    ("result", "wire"),
    [
        (Version(1), b'{"version":1}'),
        (AllocateIoResult(1), b'{"ioBase":1}'),
        (AllocateIoResult(2**48), b'{"ioBase":281474976710656}'),
    ],
)
def test_results(result: Version | AllocateIoResult, wire: bytes) -> None:
    assert text(result) == wire
    assert decode(wire, type(result)) == result


@pytest.mark.parametrize(
    ("kind", "empty"),
    [
        (Hello, Hello("", "", "", "")),
        (Attach, Attach("")),
        (Bye, Bye("")),
        (AllocateIo, AllocateIo(0)),
        (Request, Request("")),
    ],
)
def test_absent_members_are_empty_and_unknown_ones_ignored(
    kind: type[msgspec.Struct], empty: msgspec.Struct
) -> None:
    assert decode(b"{}", kind) == empty
    assert decode(b'{"unknown":[1,{"x":null}],"":0}', kind) == empty


def test_an_absent_command_is_empty() -> None:
    hyper = decode(b"{}", Hyper)
    assert (hyper.hyper_name, hyper.data) == ("", msgspec.UNSET)


MEMBERS: list[tuple[type[msgspec.Struct], str]] = [
    (Hello, "containerId"),
    (Hello, "ctlSerial"),
    (Hello, "ioSerial"),
    (Hello, "console"),
    (Attach, "containerId"),
    (Bye, "containerId"),
    (Hyper, "hyperName"),
    (Request, "id"),
]


def test_a_string_is_a_string() -> None:
    values = (b"null", b"1", b"1.5", b"true", b"[]", b"{}", b'["x"]')
    for (kind, member), value in itertools.product(MEMBERS, values):
        with pytest.raises(ProtocolError, match=member):
            decode(b'{"%b":%b}' % (member.encode(), value), kind)


@pytest.mark.parametrize(
    ("kind", "member"), [(AllocateIo, "nStreams"), (Version, "version"), (AllocateIoResult, "ioBase")]
)
def test_a_number_is_an_integer(kind: type[msgspec.Struct], member: str) -> None:
    for value in (b"null", b'"1"', b"1.0", b"1e0", b"2.5", b"true", b"[1]", b"{}", b"9" * 10_000):
        with pytest.raises(ProtocolError, match=member) as caught:
            decode(b'{"%b":%b}' % (member.encode(), value), kind)
        assert len(str(caught.value)) < 300


def test_any_integer_reaches_the_handler_that_refuses_it() -> None:
    for number in (0, 3, -1, 2**31, 2**63, -(2**63), 2**64 - 1):
        assert decode(b'{"nStreams":%d}' % number, AllocateIo).n_streams == number


def test_success_is_true_or_false() -> None:
    for value in (b"null", b"0", b"1", b'"true"', b"[]"):
        with pytest.raises(ProtocolError, match="success"):
            decode(b'{"success":%b}' % value, Response)


def test_success_cannot_be_absent() -> None:
    with pytest.raises(ProtocolError, match="success"):
        decode(b'{"error":""}', Response)


@pytest.mark.parametrize(
    ("wire", "success", "error", "data"),
    [
        (b'{"success":true}', True, "", None),
        (b'{"success":false,"error":"no"}', False, "no", None),
        (b' { "data" : {"version" : 1} , "success" : true } ', True, "", b'{"version" : 1}'),
        (b'{"success":true,"error":"","data":null,"more":1}', True, "", b"null"),
    ],
)
def test_responses_are_read_in_any_spelling(
    wire: bytes, success: bool, error: str, data: bytes | None
) -> None:
    response = decode(wire, Response)
    found = None if isinstance(response.data, msgspec.UnsetType) else bytes(response.data)
    assert (response.success, response.error, found) == (success, error, data)


@pytest.mark.parametrize(
    ("message", "member"),
    [
        (Hello(), "container_id"),
        (AllocateIo(1), "n_streams"),
        (Request("a"), "id"),
        (Response(True), "success"),
    ],
)
def test_payloads_do_not_change(message: msgspec.Struct, member: str) -> None:
    with pytest.raises(AttributeError):
        setattr(message, member, "x")
