"""The control channel: messages in any pieces, and whose each answer is."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc

import pytest

from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import (
    MAX_COMMAND,
    Command,
    ControlChannel,
    ControlMessage,
    ControlParser,
    encode,
)
from tests.api.support import cpu_seconds, splits

READY = bytes.fromhex("00000008 00000008")
NEXT_8 = bytes.fromhex("0000000e 0000000c 00000008")
NEXT_2 = bytes.fromhex("0000000e 0000000c 00000002")
ACK = bytes.fromhex("00000009 00000008")
ACK_4242 = bytes.fromhex("00000009 0000000c 00001092")
ACK_FILE = bytes.fromhex("00000009 00000012 68656c6c6f2066696c65")
ERROR = bytes.fromhex("0000000a 00000008")
ERROR_TEXT = bytes.fromhex("0000000a 0000000a 6e6f")
FINISH_CMD = bytes.fromhex("00000007 00000008")
FINISH_POD = bytes.fromhex("0000000d 00000008")
ASYNC_EVENT = bytes.fromhex("00000017 0000000a 7b7d")
UNKNOWN = bytes.fromhex("00000063 00000009 00")

EVENTS = [READY, NEXT_8, NEXT_2, FINISH_CMD, FINISH_POD, ASYNC_EVENT, UNKNOWN]
EVENTS_READ = [
    (8, b""),
    (14, b"\0\0\0\x08"),
    (14, b"\0\0\0\x02"),
    (7, b""),
    (13, b""),
    (23, b"{}"),
    (99, b"\0"),
]

MIB = 1_048_576
LONGEST = 64 * MIB
KEPT = 65_536


def control(code: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A control message; `length` is what its header claims."""
    return struct.pack(">II", code, 8 + len(payload) if length is None else length) + payload


def read(messages: list[ControlMessage]) -> list[tuple[int, bytes]]:
    return [(message.code, message.payload) for message in messages]


def parse(pieces: list[bytes]) -> list[tuple[int, bytes]]:
    parser = ControlParser()
    return [message for piece in pieces for message in read(parser.receive_data(piece))]


def answers(*commands: Command) -> list[tuple[int, bytes] | None]:
    return [read([command.answer])[0] if command.answer else None for command in commands]


# Messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "payload", "wire"),
    [
        (Code.VERSION, b"", "00000000 00000008"),
        (Code.PING, b"{}", "0000000c 0000000a 7b7d"),
        (Code.DESTROY_POD, b'""', "00000004 0000000a 2222"),
        (Code.DELETE_INTERFACE, b"\0\xff", "00000019 0000000a 00ff"),
        (9, b"\0\0\x10\x92", "00000009 0000000c 00001092"),
        (2**32 - 1, b"", "ffffffff 00000008"),
    ],
)
def test_messages_out(code: int, payload: bytes, wire: str) -> None:
    assert encode(code, payload) == bytes.fromhex(wire)


def test_a_long_message_out() -> None:
    assert encode(17, b"x" * 10_232) == b"\0\0\0\x11\0\0\x28\0" + b"x" * 10_232
    assert MAX_COMMAND == 10_240


@pytest.mark.parametrize("behind", [b"", ACK_FILE[:1], ACK_FILE[:7], ACK_FILE[:8], ACK_FILE[:-1]])
def test_messages_in_whatever_pieces(behind: bytes) -> None:
    stream = b"".join([*EVENTS, ACK_4242, ACK, ACK_FILE, ERROR, ERROR_TEXT])
    expected = [*EVENTS_READ, (9, b"\0\0\x10\x92"), (9, b""), (9, b"hello file"), (10, b""), (10, b"no")]
    for pieces in splits(stream + behind):
        assert parse(pieces) == expected, pieces


@pytest.mark.parametrize("size", [0, 1, KEPT - 1, KEPT, KEPT + 1, 3 * KEPT])
def test_a_message_is_there_with_its_last_byte_and_not_before(size: int) -> None:
    """One that was cut off by the end of the connection has not come."""
    parser = ControlParser()
    data = control(9, bytes(size))
    assert parser.receive_data(data[:-1]) == []
    assert len(parser.receive_data(data[-1:])) == 1


@pytest.mark.parametrize("size", [KEPT - 1, KEPT, KEPT + 1, KEPT + 8, 2 * KEPT, 3 * MIB])
def test_of_a_long_payload_the_beginning_is_kept_and_the_next_message_found(size: int) -> None:
    payload = random.Random(3).randbytes(size)
    stream = ACK + control(9, payload) + ERROR_TEXT + READY
    expected = [(9, b""), (9, payload[:KEPT]), (10, b"no"), (8, b"")]
    for piece in (len(stream), KEPT, KEPT + 8, 10_000):
        assert parse([stream[at : at + piece] for at in range(0, len(stream), piece)]) == expected


def test_long_messages_one_after_the_other_in_pieces_that_end_anywhere() -> None:
    stream = (control(9, b"a" * (KEPT + 3)) + control(10, b"b" * (KEPT + 1))) * 2
    expected = [(9, b"a" * KEPT), (10, b"b" * KEPT)] * 2
    long, short = KEPT + 11, KEPT + 9
    for cut in {*range(KEPT, KEPT + 24), *range(long + short - 4, long + short + 12)}:
        assert parse([stream[:cut], stream[cut:]]) == expected


@pytest.mark.parametrize("length", [0, 1, 4, 7, LONGEST + 1, 2**31, 2**32 - 1])
def test_an_impossible_length_is_an_error_that_names_it(length: int) -> None:
    for code in (9, 10, 14, 99):
        if code == 9 and length == LONGEST + 1:
            continue
        for pieces in splits(control(code, b"1234", length=length)):
            parser = ControlParser()
            assert [parser.receive_data(piece) for piece in pieces] == [[]] * len(pieces)
            assert re.search(rf"\b{length}\b", parser.error or "")
            assert parser.receive_data(ACK) == []


def test_the_longest_message_begins_like_any_other() -> None:
    parser = ControlParser()
    parser.receive_data(control(14, b"x", length=LONGEST))
    parser.receive_data(bytes(MIB))
    assert parser.error is None


@pytest.mark.parametrize(
    ("length", "fits"), [(LONGEST + 1, True), (1024 * MIB, True), (1024 * MIB + 1, False)]
)
def test_an_ack_may_be_longer(length: int, fits: bool) -> None:
    """`readfile` is answered with a whole file, of which hardly anything is kept."""
    parser = ControlParser()
    parser.receive_data(control(9, b"x", length=length))
    parser.receive_data(bytes(KEPT - 1))
    assert (parser.error is None) == fits
    assert not fits or parser.missing == length - 8 - KEPT


def test_an_announced_length_allocates_nothing_and_a_long_payload_little() -> None:
    parser = ControlParser()
    piece = bytes(KEPT)
    tracemalloc.start()
    try:
        parser.receive_data(control(9, length=LONGEST))
        assert tracemalloc.get_traced_memory()[1] < 10_000
        for _ in range(LONGEST // KEPT - 1):
            parser.receive_data(piece)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        assert len(parser.receive_data(bytes(KEPT - 8) + READY)) >= 1
        assert read(parser.receive_data(ACK)) == [(9, b"")]
    finally:
        tracemalloc.stop()


def test_nothing_received_changes_nothing() -> None:
    assert parse([b"", ACK_FILE[:3], b"", ACK_FILE[3:], b""]) == [(9, b"hello file")]


def test_random_streams_in_random_pieces() -> None:
    rng = random.Random(4)
    for _ in range(100):
        expected = [
            (rng.choice((*range(27), 2**32 - 1)), rng.randbytes(rng.choice((0, 1, 8, 300))))
            for _ in range(20)
        ]
        stream = b"".join(control(code, payload) for code, payload in expected)
        pieces = []
        while stream:
            size = rng.choice((1, 4, 8, 12, 700))
            pieces.append(stream[:size])
            stream = stream[size:]
        assert parse(pieces) == expected


def test_many_messages_in_one_piece_are_not_copied_for_each() -> None:
    stream = NEXT_8 * 30_000

    def run() -> None:
        assert len(parse([stream])) == 30_000

    assert cpu_seconds(run) < 0.5


def test_messages_say_what_they_are() -> None:
    assert [str(message) for message in ControlParser().receive_data(ACK + ASYNC_EVENT + UNKNOWN)] == [
        "ack",
        "processasyncevent",
        "code 99",
    ]


# Commands and their answers ---------------------------------------------------------------------------------


def test_commands_go_out_in_their_order() -> None:
    channel = ControlChannel()
    assert channel.outgoing == b""
    channel.send(Code.VERSION)
    channel.send(Code.PING, b"{}")
    assert channel.outgoing == bytes.fromhex("00000000 00000008 0000000c 0000000a 7b7d")
    del channel.outgoing[:5]
    channel.send(Code.DESTROY_POD, b'""')
    assert channel.outgoing == bytes.fromhex("000008 0000000c 0000000a 7b7d 00000004 0000000a 2222")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ACK, (9, b"")),
        (ACK_4242, (9, b"\0\0\x10\x92")),
        (ACK_FILE, (9, b"hello file")),
        (ERROR, (10, b"")),
        (ERROR_TEXT, (10, b"no")),
    ],
)
def test_an_ack_or_an_error_ends_a_command_and_nothing_else_does(
    answer: bytes, expected: tuple[int, bytes]
) -> None:
    for pieces in splits(b"".join(EVENTS) + answer + b"".join(EVENTS)):
        channel = ControlChannel()
        command = channel.send(Code.READ_FILE)
        assert command.code == Code.READ_FILE
        events: list[tuple[int, bytes]] = []
        missing = len(b"".join(EVENTS) + answer)
        for piece in pieces:
            assert command.answer is None or missing <= 0
            events += read(channel.receive_data(piece))
            missing -= len(piece)
        assert answers(command) == [expected], pieces
        assert events == EVENTS_READ * 2
        assert channel.unanswered == 0


@pytest.mark.parametrize(("event", "expected"), list(zip(EVENTS, EVENTS_READ, strict=True)))
def test_an_event_before_between_and_after(event: bytes, expected: tuple[int, bytes]) -> None:
    channel = ControlChannel()
    assert read(channel.receive_data(event)) == [expected]
    first, second = channel.send(Code.PING), channel.send(Code.VERSION)
    assert read(channel.receive_data(event)) == [expected]
    assert answers(first, second) == [None, None]
    assert read(channel.receive_data(ACK + event)) == [expected]
    assert answers(first, second) == [(9, b""), None]
    assert read(channel.receive_data(event + ERROR_TEXT + event)) == [expected] * 2
    assert answers(first, second) == [(9, b""), (10, b"no")]
    assert read(channel.receive_data(event)) == [expected]


def test_the_transcript_of_a_boot_and_two_commands() -> None:
    stream = READY + NEXT_8 + ACK_4242 + NEXT_8 + NEXT_2 + ACK
    for pieces in splits(stream):
        channel = ControlChannel()
        commands = [channel.send(Code.VERSION), channel.send(Code.PING, b"{}")]
        events = [message for piece in pieces for message in read(channel.receive_data(piece))]
        assert answers(*commands) == [(9, b"\0\0\x10\x92"), (9, b"")]
        assert events == [(8, b""), (14, b"\0\0\0\x08"), (14, b"\0\0\0\x08"), (14, b"\0\0\0\x02")]


def test_answers_come_in_the_order_of_the_commands() -> None:
    channel = ControlChannel()
    commands = [channel.send(Code.PING) for _ in range(4)]
    assert channel.unanswered == 4
    channel.receive_data(ACK_FILE + ERROR)
    assert answers(*commands) == [(9, b"hello file"), (10, b""), None, None]
    assert channel.unanswered == 2
    channel.receive_data(ERROR_TEXT + ACK)
    assert answers(*commands) == [(9, b"hello file"), (10, b""), (10, b"no"), (9, b"")]


def test_a_late_answer_is_its_own_commands_and_not_the_nexts() -> None:
    channel = ControlChannel()
    given_up = channel.send(Code.DESTROY_POD)
    del given_up  # nobody waits for it any more
    asked = channel.send(Code.READ_FILE)
    assert channel.unanswered == 2
    channel.receive_data(ERROR_TEXT)
    assert answers(asked) == [None]
    channel.receive_data(NEXT_8 + ACK_FILE)
    assert answers(asked) == [(9, b"hello file")]


def test_an_answer_nobody_asked_for_is_an_event_and_no_later_commands_answer() -> None:
    channel = ControlChannel()
    assert read(channel.receive_data(ACK + ERROR_TEXT)) == [(9, b""), (10, b"no")]
    command = channel.send(Code.PING)
    assert answers(command) == [None]
    assert read(channel.receive_data(ACK_4242 + ACK)) == [(9, b"")]
    assert answers(command) == [(9, b"\0\0\x10\x92")]
    assert channel.unanswered == 0


def test_ready() -> None:
    channel = ControlChannel()
    ready = []
    for data in (NEXT_8 + ACK + ASYNC_EVENT, READY[:-1], READY[-1:], NEXT_8, READY):
        channel.receive_data(data)
        ready.append(channel.ready)
    assert ready == [False, False, True, True, True]


def test_ready_by_itself_sends_nothing() -> None:
    channel = ControlChannel()
    channel.receive_data(READY)
    assert channel.outgoing == b""


def test_an_answer_that_is_not_whole_is_none() -> None:
    """Even if more of it has come than is kept: the connection may end before it does."""
    channel = ControlChannel()
    command = channel.send(Code.READ_FILE)
    channel.receive_data(control(9, bytes(2 * KEPT))[:-1])
    assert command.answer is None


@pytest.mark.parametrize(("code", "length"), [(9, 0), (9, 7), (9, 2**32 - 1), (10, LONGEST + 1)])
def test_lost_framing_is_an_error_whatever_the_pieces_and_what_came_before_counts(
    code: int, length: int
) -> None:
    for pieces in splits(NEXT_8 + ACK_FILE + control(code, length=length)):
        channel = ControlChannel()
        answered, lost = channel.send(Code.READ_FILE), channel.send(Code.PING)
        for piece in pieces:
            assert channel.error is None
            channel.receive_data(piece)
        assert channel.error
        assert answers(answered, lost) == [(9, b"hello file"), None], pieces
