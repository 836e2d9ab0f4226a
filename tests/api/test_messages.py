"""Client messages as bytes: the 8-byte header, the limits, and what is a JSON object."""

from __future__ import annotations

import random
import tracemalloc

import msgspec
import pytest

from cc_proxy.api import AllocateIo, Attach, Hello, Hyper, ProtocolError, Request, Response
from cc_proxy.api.messages import MemberError, MessageParser, decode, encode, frame_text, text_length
from tests.api.support import cpu_seconds, message, splits

MIB = 1_048_576


def texts_of(pieces: list[bytes]) -> tuple[list[bytes], MessageParser]:
    """What a parser makes of the pieces, all that it has taken after each."""
    parser = MessageParser()
    texts = []
    for piece in pieces:
        parser.receive_data(piece)
        while (text := parser.next_text()) is not None:
            texts.append(text)
    return texts, parser


def data_of(text: bytes, kind: type[Request | Hyper] = Request) -> bytes:
    data = decode(text, kind).data
    assert isinstance(data, msgspec.Raw)
    return bytes(data)


# Bytes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "wire"),
    [
        (Response(True), b'\0\0\0\x10\0\0\0\0{"success":true}'),
        (Response(False, "no"), b'\0\0\0\x1e\0\0\0\0{"success":false,"error":"no"}'),
        (Request("bye"), b'\0\0\0\x0c\0\0\0\0{"id":"bye"}'),
        (Request(), b"\0\0\0\x02\0\0\0\0{}"),
    ],
)
def test_a_message_is_length_zero_and_compact_json(sent: Request | Response, wire: bytes) -> None:
    assert encode(sent) == wire


def test_a_text_of_1_mib_is_framed_and_one_byte_more_is_not() -> None:
    assert frame_text(b"x" * MIB) == b"\0\x10\0\0\0\0\0\0" + b"x" * MIB
    with pytest.raises(ProtocolError, match="1048577"):
        frame_text(b"x" * (MIB + 1))


def test_a_message_of_1_mib_is_encoded_and_one_byte_more_is_not() -> None:
    room = MIB - len(b'{"success":false,"error":""}')
    assert len(encode(Response(False, "x" * room))) == 8 + MIB
    with pytest.raises(ProtocolError, match="1048577"):
        encode(Response(False, "x" * (room + 1)))


def test_the_length_counts_bytes_and_not_characters() -> None:
    assert encode(Request("é€😀")) == message('{"id":"é€😀"}'.encode())


# Headers ----------------------------------------------------------------------------------------------------


def test_lengths_up_to_1_mib_are_right() -> None:
    for length in (0, 1, 255, 256, 65_536, MIB - 1, MIB):
        assert text_length(length.to_bytes(4, "big") + bytes(4)) == length


def test_longer_ones_are_refused_and_named() -> None:
    for length in (MIB + 1, 2 * MIB, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF):
        with pytest.raises(ProtocolError, match=str(length)):
            text_length(length.to_bytes(4, "big") + bytes(4))


def test_each_bit_of_the_reserved_field_has_to_be_0() -> None:
    for bit in range(32):
        with pytest.raises(ProtocolError, match="reserved"):
            text_length(bytes(4) + (1 << bit).to_bytes(4, "big"))


# Bytes in ---------------------------------------------------------------------------------------------------

TEXTS = [b'{"id":"attach"}', b"", b'{"id":"\xc3\xa9"}', b"{}", b"no JSON at all \0", b"", b'{"success":true}']
STREAM = b"".join(map(message, TEXTS))


def test_messages_come_out_in_whatever_pieces_they_arrive() -> None:
    for pieces in splits(STREAM):
        texts, parser = texts_of(pieces)
        assert texts == TEXTS, pieces
        assert not parser.unfinished
        assert parser.missing == 8


def test_what_stands_behind_a_message_waits_for_the_rest() -> None:
    second = message(b"12345")
    for held in range(1, len(second)):
        for pieces in splits(message(b"{}") + second[:held]):
            texts, parser = texts_of(pieces)
            assert texts == [b"{}"], pieces
            assert parser.unfinished
            assert parser.missing == (8 - held if held < 8 else 13 - held)
            parser.receive_data(second[held:])
            assert parser.next_text() == b"12345"
            assert parser.next_text() is None


def test_texts_wait_until_they_are_taken() -> None:
    parser = MessageParser()
    for text in (b"1", b"22", b"", b"333"):
        parser.receive_data(message(text))
    assert [parser.next_text() for _ in range(5)] == [b"1", b"22", b"", b"333", None]


def test_taking_and_receiving_may_alternate() -> None:
    parser = MessageParser()
    parser.receive_data(message(b"1") + message(b"22") + message(b"333")[:9])
    assert parser.next_text() == b"1"
    parser.receive_data(message(b"333")[9:10])
    assert parser.next_text() == b"22"
    assert parser.next_text() is None
    assert parser.missing == 1
    parser.receive_data(message(b"333")[10:] + message(b"4"))
    assert [parser.next_text() for _ in range(3)] == [b"333", b"4", None]


def test_what_is_missing_is_known_as_soon_as_it_can_be() -> None:
    parser = MessageParser()
    stream = message(b"12345")
    assert not parser.unfinished
    for held in range(len(stream)):
        assert parser.next_text() is None
        assert parser.missing == (8 - held if held < 8 else 13 - held)
        assert parser.unfinished == (held > 0)
        parser.receive_data(stream[held : held + 1])
    assert parser.next_text() == b"12345"


def test_nothing_received_changes_nothing() -> None:
    parser = MessageParser()
    for piece in (b"", message(b"{}")[:5], b"", message(b"{}")[5:], b""):
        parser.receive_data(piece)
    assert parser.next_text() == b"{}"
    parser.receive_data(b"")
    assert parser.next_text() is None
    assert not parser.unfinished


def test_random_streams_in_random_pieces() -> None:
    rng = random.Random(1)
    for _ in range(100):
        texts = [rng.randbytes(rng.choice((0, 1, 7, 8, 9, 300))) for _ in range(rng.randrange(12))]
        stream = b"".join(map(message, texts))
        parser = MessageParser()
        got = []
        while stream or parser.unfinished:
            size = rng.choice((1, 5, 8, 16, 400))
            parser.receive_data(stream[:size])
            stream = stream[size:]
            for _ in range(rng.randrange(4) if stream else len(texts) + 1):
                if (text := parser.next_text()) is not None:
                    got.append(text)
        assert got == texts


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"\0\x10\0\x01\0\0\0\0", id="1 MiB and a byte"),
        pytest.param(b"\xff\xff\xff\xff\0\0\0\0", id="4 GiB"),
        pytest.param(b"\0\0\0\x02\0\0\0\x01", id="reserved, last bit"),
        pytest.param(b"\0\0\0\x02\x80\0\0\0", id="reserved, first bit"),
        pytest.param(b'{"id":"attach"}'[:8], id="JSON without a header"),
        pytest.param(b"GET / HT", id="HTTP"),
    ],
)
def test_a_wrong_header_is_an_error_and_stays_one(header: bytes) -> None:
    for pieces in splits(message(b"1") + message(b"22") + header + b"{}"):
        parser = MessageParser()
        texts = []
        with pytest.raises(ProtocolError):  # noqa: PT012 - in which piece it is noticed does not matter
            for piece in pieces:
                parser.receive_data(piece)
                while (text := parser.next_text()) is not None:
                    texts.append(text)
        assert texts == [b"1", b"22"], pieces
        with pytest.raises(ProtocolError):
            parser.next_text()
        parser.receive_data(message(b"3"))
        with pytest.raises(ProtocolError):
            parser.next_text()


def test_a_text_of_1_mib_arrives() -> None:
    text = random.Random(2).randbytes(MIB)
    stream = message(text) + message(b"{}")
    for size in (len(stream), 65_536, 4_097):
        texts, _ = texts_of([stream[at : at + size] for at in range(0, len(stream), size)])
        assert texts == [text, b"{}"]


def test_an_announced_length_allocates_nothing() -> None:
    parser = MessageParser()
    tracemalloc.start()
    try:
        parser.receive_data(message(b"{", length=MIB))
        assert parser.next_text() is None
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


def test_what_was_taken_is_not_held_any_more() -> None:
    """A connection that is idle after a long request must not cost a long request."""
    parser = MessageParser()
    tracemalloc.start()
    try:
        for _ in range(16):
            parser.receive_data(bytes(message(b"x" * 65_536)))
            assert parser.next_text() is not None
        assert parser.next_text() is None
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()


def test_a_long_message_in_small_pieces_is_not_copied_for_each() -> None:
    stream = message(b"x" * MIB)

    def run() -> None:
        texts, _ = texts_of([stream[at : at + 64] for at in range(0, len(stream), 64)])
        assert len(texts) == 1

    assert cpu_seconds(run) < 0.5


def test_many_messages_in_one_piece_are_not_copied_for_each() -> None:
    stream = message(b"{}") * 50_000

    def run() -> None:
        texts, _ = texts_of([stream])
        assert len(texts) == 50_000

    assert cpu_seconds(run) < 0.5


# What a text may be -----------------------------------------------------------------------------------------


NO_OBJECTS = {
    "other values": [b"", b" \n", b"null", b"true", b"1", b'"id"', b"[]", b'[{"id":"a"}]'],
    "cut off": [
        b"{",
        b'{"id":"a"',
        b'{"id":"a}',
        b'{"id":"a\\',
        b'{"id"',
        b'{"id":',
        b'{"id":"a","data":nul',
    ],
    "syntax": [
        b"}",
        b'{"id"}',
        b'{"id":}',
        b'{"id" "a"}',
        b'{"id":"a",}',
        b'{,"id":"a"}',
        b"{'id':'a'}",
        b'{id:"a"}',
        b'{1:"a"}',
        b'{"id":"a","data":[1,]}',
        b'{"id":"a","data":{"a":1,}}',
        b'{"id":"a","data":nul}',
        b'{"id":"a","data":[}]',
    ],
    "strings": [b'{"id":"a\n"}', b'{"id":"\\x41"}', b'{"id":"\\u12"}', b'{"id":"a","data":"\t"}'],
    "numbers": [
        b'{"id":"a","data":%b}' % number
        for number in (b"NaN", b"-Infinity", b"01", b"1.", b".1", b"+1", b"-", b"1e", b"0x10", b"1_000")
    ],
    "something else too": [
        b'{"id":"a"}{}',
        b'{"id":"a"} x',
        b'{"id":"a"},',
        b'// x\n{"id":"a"}',
        b'{"id":"a"}#',
    ],
    "NULs": [b'{"id":"a"}\0', b'\0{"id":"a"}', b'{"id":"a\0"}', b'{"id":"a"\0}', b'{"i\0d":"a"}'],
    "no UTF-8": [
        b'{"id":"\xff"}',
        b'{"id":"\xc3"}',
        b'{"id":"\xc0\xaf"}',
        b'{"id":"\xed\xa0\x80"}',
        b'{"id":"\xf4\x90\x80\x80"}',
        b'{"id":"a","data":"\xff"}',
        b'{"id":"a","other":"\xff"}',
        b'{"\xff":1,"id":"a"}',
        b'{"id":"a"} \xff',
        b'{"id":5,"data":"\xff"}',
        b'\xef\xbb\xbf{"id":"a"}',
        '{"id":"a"}'.encode("utf-16"),
    ],
    "200,000 brackets": [b"[" * 200_000, b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 200_000],
}


def refusal(text: bytes, kind: type[msgspec.Struct]) -> ProtocolError:
    """The error, which has to fit into a response of 1,024 bytes whatever the text was."""
    try:
        decode(text, kind)
    except ProtocolError as error:
        refused = error
    else:
        pytest.fail(f"taken: {text[:100]!r}")
    assert len(str(refused)) < 300
    return refused


@pytest.mark.parametrize("texts", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_what_is_no_json_object_is_a_protocol_error(texts: list[bytes]) -> None:
    for text in texts:
        assert not isinstance(refusal(text, Request), MemberError), text[:100]


WRONG_MEMBERS: list[tuple[type[msgspec.Struct], str, list[bytes]]] = [
    (Request, "id", [b'{"id":null}', b'{"id":5}', b'{"id":["hello"]}', b'{"id":"a","id":{}}']),
    (Attach, "containerId", [b'{"containerId":5}', b'{"containerId":1' + b"0" * 500_000 + b"}"]),
    (Hello, "ctlSerial", [b'{"containerId":"a","ctlSerial":1.5}']),
    (Hello, "ioSerial", [b'{"containerId":"a","ioSerial":true}']),
    (Hello, "console", [b'{"console":null}']),
    (Hyper, "hyperName", [b'{"hyperName":7}']),
    (
        AllocateIo,
        "nStreams",
        [
            *(
                b'{"nStreams":%b}' % value
                for value in (b'"1"', b"1.0", b"1e0", b"1.5", b"1e400", b"true", b"null", b"[1]", b"{}")
            ),
            b'{"nStreams":1,"nStreams":"1"}',
            b'{"nStreams":1' + b"0" * 500_000 + b"}",
        ],
    ),
    (Response, "success", [b'{"success":1}', b"{}"]),
]


def test_an_object_with_a_member_of_another_type_is_an_error_that_names_it() -> None:
    for kind, member, texts in WRONG_MEMBERS:
        for text in texts:
            error = refusal(text, kind)
            assert isinstance(error, MemberError), text[:100]
            assert member in str(error)


def test_blanks_around_and_unknown_members_do_not_matter() -> None:
    got = decode(b'\r\n\t {"x": [1, {"y": null}], "id" : "a" , "z": "\xc3\xa9"} \n', Request)
    assert got == Request("a")


def test_the_last_of_two_members_counts() -> None:
    assert decode(b'{"id":"a","id":"b"}', Request).id == "b"


def test_names_are_taken_as_they_are_written() -> None:
    assert decode(b'{"ID":"a","Id":"b"}', Request).id == ""
    assert decode(b'{"container_id":"a"}', Attach).container_id == ""
    assert decode(b'{"nstreams":2}', AllocateIo).n_streams == 0


def test_escapes_are_undone() -> None:
    text = rb'{"id":"\u0041\u00e9\ud83d\ude00\"\\\/\b\f\n\r\t\u0000"}'
    assert decode(text, Request).id == 'Aé😀"\\/\b\f\n\r\t\0'


def test_data_stays_as_it_was_written() -> None:
    for data in (
        b"{}",
        b'{ "a" :\t1 ,\n"b":[ ] }',
        rb'"\u0041\/\ud83d\ude00"',
        b'"\xc3\xa9"',
        b"1.0",
        b"1.50e+03",
        b"-0",
        b"100000000000000000000000000000000000000000",
        b"1e999",
        b'{"a":1,"a":2,"a":1}',
        b"null",
        b"false",
        b'""',
        b"[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]",
    ):
        for text in (b'{"id":"hyper","data":%b}', b'{ "data" : %b , "id" : "hyper" }'):
            assert data_of(text % data) == data
        assert data_of(b'{"hyperName":"ping","data":%b}' % data, Hyper) == data


def test_data_of_nearly_1_mib_stays_as_it_was_written() -> None:
    data = b'["' + b"x" * (MIB - 100) + b'"]'
    assert data_of(b'{"id":"hyper","data":%b}' % data) == data


def test_absent_data_is_unset() -> None:
    assert decode(b'{"id":"a"}', Request).data is msgspec.UNSET
    assert decode(b'{"hyperName":"a"}', Hyper).data is msgspec.UNSET


# What texts cost --------------------------------------------------------------------------------------------


DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b'{"id":"a","data":%b}' % DEEP, id="arrays"),
        pytest.param(b'{"id":"a","x":' + b'{"x":' * 150_000 + b"1" + b"}" * 150_001, id="objects"),
        pytest.param(b'{"id":%b}' % DEEP, id="arrays for a string"),
        pytest.param(b'{"id":"a]","x":%b}' % DEEP, id="a bracket in a string"),
    ],
)
def test_an_object_nested_200_000_deep_is_refused(text: bytes) -> None:
    assert isinstance(refusal(text, Request), MemberError)


def test_what_is_nested_200_000_deep_and_no_json_at_all_is_refused_too() -> None:
    for text in (b"{%b}", b'{"a":%b}}{', b'{"a":%b]}', b'{"a":"%b}'):
        refusal(text % DEEP, Request)
    assert not isinstance(refusal(b'"a"{"b":%b}' % DEEP, Request), MemberError), "it begins with a string"


@pytest.mark.parametrize("depth", [100, 199])
def test_sensible_nesting_is_taken_and_brackets_in_strings_are_none(depth: int) -> None:
    data = b"[" * depth + b'"' + b"[{" * 1_000 + rb"\"[" + b'"' + b"]" * depth
    assert data_of(b'{"id":"a","data":%b}' % data) == data


def test_many_brackets_side_by_side_are_taken() -> None:
    data = b"[" + b"[{}]," * 100_000 + b"0]"
    assert data_of(b'{"id":"a","data":%b}' % data) == data


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b'"' + rb"\"" * 6_000, id="escaped quotes, not closed"),
        pytest.param(b'"' + b"\\\\" * 6_000, id="backslashes, not closed"),
        pytest.param(b'"' + b"x" * 12_000, id="one string, not closed"),
        pytest.param(b'""' * 6_000 + b'"', id="many strings, not closed"),
        pytest.param(b"\\" * 12_000, id="backslashes outside"),
        pytest.param(b"[" * 6_000 + b"]" * 6_000, id="arrays"),
    ],
)
def test_no_text_takes_time_beyond_its_length(tail: bytes) -> None:
    """12 KB, of 1,024 that a client may send: what is quadratic here holds up everybody for an hour there."""
    text = b'{"a":[' + b"[]," * 300 + tail

    def run() -> None:
        with pytest.raises(ProtocolError):
            decode(text, Request)

    assert cpu_seconds(run) < 0.1
