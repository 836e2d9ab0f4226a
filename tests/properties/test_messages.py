"""Client messages: any bytes, in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cc_proxy.api import messages
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.messages import MAX_NESTING, MAX_RESPONSE, MAX_TEXT, MemberError, MessageParser
from cc_proxy.api.payloads import Request, Response
from cc_proxy.proxy.clients.handlers import failure
from tests.properties.support import in_pieces, payloads, stream_of
from tests.slow import message, texts_in

right = st.builds(message, payloads())
wrong = st.builds(message, payloads(), st.integers(0, 2**32 - 1), st.sampled_from([0, 0, 1, 2**31]))
streams = stream_of(right, wrong | st.binary(max_size=20))

texts = st.text(st.characters(codec="utf-8"))
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20)


def take_all(parser: MessageParser) -> list[bytes]:
    return list(iter(parser.next_text, None))


@given(in_pieces(streams))
def test_parser_finds_what_a_byte_by_byte_reading_finds(pieces: list[bytes]) -> None:
    parser, found, fed = MessageParser(), [], b""
    for piece in pieces:
        fed += piece
        expected, rest, broken = texts_in(fed)
        parser.receive_data(piece)
        if broken:
            while True:
                try:
                    text = parser.next_text()
                except ProtocolError:
                    break
                assert text is not None, "a header that is not allowed was not noticed"
                found.append(text)
            assert found == expected
            return
        found += take_all(parser)
        assert found == expected
        assert parser.unfinished == bool(rest)
        lacking = 8 - len(rest) if len(rest) < 8 else 8 + int.from_bytes(rest[:4], "big") - len(rest)
        assert parser.missing == lacking


@given(st.lists(payloads(), min_size=1, max_size=6), st.binary(max_size=7))
def test_who_reads_no_more_than_is_missing_never_reads_past_a_message(
    sent: list[bytes], behind: bytes
) -> None:
    stream = b"".join(map(message, sent)) + behind
    parser, pos = MessageParser(), 0
    for text in sent:
        while (found := parser.next_text()) is None:
            end = pos + parser.missing
            parser.receive_data(stream[pos:end])
            pos = end
        assert found == text
        assert not parser.unfinished
    assert stream[pos:] == behind


@given(texts, values)
def test_requests_survive_the_wire_and_their_data_byte_for_byte(name: str, value: Any) -> None:
    for data in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=3)):
        text = f'{{"other":[1.50e+1],"id":{json.dumps(name)}, "data" : {data} }}'.encode()
        request = messages.decode(text, Request)
        assert (request.id, bytes(request.data)) == (name, data.encode())  # type: ignore[arg-type]
        parser = MessageParser()
        parser.receive_data(messages.encode(request))
        assert messages.decode(parser.next_text() or b"", Request) == request


@given(st.booleans(), texts)
def test_responses_survive_the_wire(success: bool, error: str) -> None:
    response = Response(success, error)
    text = messages.encode(response)[8:]
    assert messages.decode(text, Response) == response
    assert json.loads(text) == {"success": success} | ({"error": error} if error else {})


@given(values)
@example({"id": 1})
@example([])
def test_what_is_no_request_is_told_apart_from_what_is_no_object(value: Any) -> None:
    text = json.dumps(value).encode()
    if not isinstance(value, dict):
        with pytest.raises(ProtocolError) as caught:
            messages.decode(text, Request)
        assert not isinstance(caught.value, MemberError)
    elif isinstance(value.get("id", ""), str):
        assert messages.decode(text, Request).id == value.get("id", "")
    else:
        with pytest.raises(MemberError, match="id"):
            messages.decode(text, Request)


jsonish = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b'"id"', b"1", b"null", b"\xff", b" "]),
    max_size=30,
).map(b"".join)


@given(st.binary(max_size=300) | jsonish)
def test_any_bytes_are_a_request_or_a_protocol_error(text: bytes) -> None:
    try:
        request = messages.decode(text, Request)
    except ProtocolError:
        return
    assert isinstance(json.loads(text), dict)
    assert json.loads(text).get("id", "") == request.id


@given(
    st.lists(st.booleans(), min_size=1, max_size=2 * MAX_NESTING),
    st.text('[]{}\\"a', max_size=300),
    st.booleans(),
)
@example([True] * (MAX_NESTING - 1), "[" * 300, True)
@example([True] * MAX_NESTING, "", True)
def test_nesting_is_counted_outside_of_strings_only(arrays: list[bool], inside: str, close: bool) -> None:
    """As many levels as there are brackets, whatever brackets stand in the string in the middle."""
    opening = "".join("[" if array else '{"k":' for array in arrays)
    closing = "".join("]" if array else "}" for array in reversed(arrays))
    text = f'{{"id":"x","data":{opening}{json.dumps(inside)}{closing if close else ""}}}'.encode()
    if not close:
        with pytest.raises(ProtocolError):
            messages.decode(text, Request)
    elif len(arrays) + 1 > MAX_NESTING:
        with pytest.raises(MemberError, match=f"nested more than {MAX_NESTING} levels"):
            messages.decode(text, Request)
    else:
        assert messages.decode(text, Request).id == "x"


@given(payloads(longest=MAX_TEXT + 10))
@example(bytes(MAX_TEXT))
@example(bytes(MAX_TEXT + 1))
def test_text_is_framed_up_to_the_limit(text: bytes) -> None:
    if len(text) > MAX_TEXT:
        with pytest.raises(ProtocolError):
            messages.frame_text(text)
    else:
        assert messages.frame_text(text) == message(text)


@given(texts, st.integers(0, 1200))
@example("\x00", 1200)
@example("\U0001f600", 1200)
def test_refusals_fit_into_what_every_client_can_take(text: str, times: int) -> None:
    whole = text * times
    response = failure(whole).message[8:]
    assert len(response) <= MAX_RESPONSE
    said = json.loads(response).get("error", "")
    assert said == whole or (said.endswith("…") and whole.startswith(said[:-1]))
