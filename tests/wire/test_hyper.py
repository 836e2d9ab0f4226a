"""hyper forwards a command and waits for its answer (docs/protocol.md, 1 and 2)."""

from __future__ import annotations

import json

import pytest

from tests.wire.daemon import Pod, Wire
from tests.wire.support import (
    ACK,
    ASYNC_EVENT,
    ERROR,
    FINISHCMD,
    FINISHPOD,
    GETVERSION,
    HYPERSTART_ERROR,
    NEXT,
    NOT_ATTACHED,
    OK,
    PING,
    READY,
    command,
    error_of,
    in_pieces,
    is_silent,
    message,
    refused,
    request,
)

CODES = {
    "version": 0,
    "getversion": GETVERSION,
    "startpod": 1,
    "getpod": 2,
    "stoppod": 3,
    "destroypod": 4,
    "restartcontainer": 5,
    "execcmd": 6,
    "finishcmd": FINISHCMD,
    "winsize": 11,
    "ping": PING,
    "finishpod": FINISHPOD,
    "writefile": 15,
    "readfile": 16,
    "newcontainer": 17,
    "killcontainer": 18,
    "onlinecpumem": 19,
    "setupinterface": 20,
    "setuproute": 21,
    "removecontainer": 22,
    "signalprocess": 24,
    "deleteinterface": 25,
}
NEXT_8 = b"\0\0\0\10"


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_each_name_has_its_code(wire: Wire, name: str, code: int) -> None:
    pod = wire.pod()
    pod.client.hyper(name, '{"a":1}')
    assert pod.vm.acknowledge() == (code, b'{"a":1}')
    assert pod.client.receive() == OK


@pytest.mark.parametrize("name", ["ready", "ack", "error", "next", "processasyncevent"])
def test_names_that_are_the_agents_to_send_are_refused(wire: Wire, name: str) -> None:
    pod = wire.pod()
    assert error_of(pod.client.ask("hyper", {"hyperName": name}))
    assert pod.pings()  # the first thing the VM gets


@pytest.mark.parametrize("name", ["foo", "", "12", "ping ", "PING2", "\u00e9", "a'b"])
def test_unknown_command_is_an_error_with_its_name(wire: Wire, name: str) -> None:
    pod = wire.pod()
    assert pod.client.ask("hyper", {"hyperName": name}) == refused(f"unknown command '{name}'")
    assert pod.pings()


def test_client_that_is_not_attached_is_refused(wire: Wire) -> None:
    assert wire.client().ask("hyper", {"hyperName": "ping"}) == NOT_ATTACHED


def test_big_endian_header_with_the_total_length(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("ping", "{}")
    assert pod.vm.ctl.recv(100) == b"\0\0\0\x0c\0\0\0\x0a{}"
    pod.vm.ctl.sendall(b"\0\0\0\x09\0\0\0\x08")
    assert pod.client.receive() == OK


def test_absent_data_is_no_payload(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("getpod")
    assert pod.vm.acknowledge() == (2, b"")
    assert pod.client.receive() == OK


@pytest.mark.parametrize(
    "data",
    [
        "{}",
        "[]",
        '""',
        "0",
        "null",
        "true",
        '{ "a" :  1 ,\t"b":\r\n[ ] }',
        "[ 1 , 2]",
        r'"\u0041\/\"\\\n\u00e9\ud83d\ude00"',
        '"\u00e9\u2028\U0001f600\x7f"',
        '{"n":[0.10,1E+2,-0,1e-7,1.0,100000000000000000000000,1e400,0.1e1,123456789012345678.90]}',
        '{"a":1,"a":2,"a":1}',
        '{"b":1,"a":2}',
        '{"":{"":""}}',
        '{"hyperName":"next","data":{"id":"bye"}}',
        r'{"\u0061":1}',
    ],
)
def test_data_goes_out_byte_for_byte(wire: Wire, data: str) -> None:
    pod = wire.pod()
    pod.client.hyper("execcmd", data)
    assert pod.vm.acknowledge() == (6, data.encode())
    assert pod.client.receive() == OK


@pytest.mark.parametrize(
    "text",
    [
        '{"id":"hyper","data":{"hyperName":"ping","data":{ "a": 1 }}}',
        '{"data":{"data":{ "a": 1 },"hyperName":"ping"},"id":"hyper"}',
        '{"id":"hyper","data":{"hyperName":"ping","data" : \n\t{ "a": 1 } \r\n}}',
        '{"x":{"data":2},"id":"hyper","data":{"y":{"data":3},"hyperName":"ping","data":{ "a": 1 },"z":"}"}}',
        r'{"id":"hyper","data":{"hyperName":"\u0070ing","d\u0061ta":{ "a": 1 }}}',
    ],
)
def test_data_is_found_wherever_the_client_put_it(wire: Wire, text: str) -> None:
    pod = wire.pod()
    pod.client.send(message(text))
    assert pod.vm.acknowledge() == (PING, b'{ "a": 1 }')
    assert pod.client.receive() == OK


def test_message_of_10240_bytes_is_sent(wire: Wire) -> None:
    pod = wire.pod()
    data = json.dumps("a" * (10_240 - 8 - 2))
    pod.client.hyper("writefile", data)
    assert pod.vm.acknowledge() == (15, data.encode())
    assert pod.client.receive() == OK


@pytest.mark.parametrize("size", [10_241, 10_242, 100_000, 1_000_000])
def test_longer_message_is_refused_and_the_vm_stays_usable(wire: Wire, size: int) -> None:
    pod = wire.pod()
    data = json.dumps("a" * (size - 8 - 2))
    pod.client.hyper("writefile", data)
    assert pod.client.receive() == refused(f"message too long {size}")
    assert pod.pings()


def test_length_is_counted_in_bytes(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("writefile", '"' + "\u00e9" * 6_000 + '"')
    assert pod.client.receive() == refused("message too long 12010")


@pytest.mark.parametrize("payload", [b"", b"\0\0\x10\x92", b"hello file", b"{}", b"\xff" * 10_232])
def test_ack_with_or_without_payload_is_success_without_data(wire: Wire, payload: bytes) -> None:
    pod = wire.pod()
    pod.client.hyper("readfile", "{}")
    pod.vm.acknowledge(payload)
    assert pod.client.receive() == OK
    assert pod.pings()


def answered(pod: Pod, *answers: tuple[int, bytes]) -> bytes:
    """The response to a command that the VM answers with these messages, in one write."""
    pod.client.hyper("ping")
    pod.vm.read_command()
    pod.vm.ctl.sendall(b"".join(command(code, payload) for code, payload in answers))
    return pod.client.receive()


def test_error_without_text(wire: Wire) -> None:
    assert answered(wire.pod(), (ERROR, b"")) == HYPERSTART_ERROR


def test_error_with_text_says_what_the_vm_said(wire: Wire) -> None:
    pod = wire.pod()
    error = error_of(answered(pod, (ERROR, b"no such container")))
    assert error.startswith("ERROR received from Hyperstart")
    assert "no such container" in error
    assert pod.pings()


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\0\1", b"\0", "\u20ac".encode() * 3_000, b'"' * 10_232, b"\x1b[2J\n"]
)
def test_error_with_any_bytes_is_a_response_of_at_most_1024(wire: Wire, text: bytes) -> None:
    pod = wire.pod()
    assert error_of(answered(pod, (ERROR, text))).startswith("ERROR received from Hyperstart")
    assert pod.pings()


EVENTS = [
    (NEXT, NEXT_8),
    (NEXT, b"\0\0\0\2"),
    (READY, b""),
    (FINISHCMD, b"\0\0\0\1"),
    (FINISHPOD, b"\0\0\0\0"),
    (ASYNC_EVENT, b'{"event":"ProcessExited"}'),
]


@pytest.mark.parametrize("event", EVENTS)
def test_event_between_command_and_answer_is_never_taken_for_the_answer(
    wire: Wire, event: tuple[int, bytes]
) -> None:
    pod = wire.pod()
    assert answered(pod, event, (ERROR, b"")) == HYPERSTART_ERROR
    assert answered(pod, event, event, (ACK, b"")) == OK


@pytest.mark.parametrize("event", EVENTS)
def test_event_before_a_command_is_never_taken_for_the_answer(wire: Wire, event: tuple[int, bytes]) -> None:
    pod = wire.pod()
    pod.vm.say(*event)
    assert answered(pod, (ERROR, b""), event) == HYPERSTART_ERROR
    assert answered(pod, (ERROR, b"")) == HYPERSTART_ERROR


@pytest.mark.parametrize("code", [26, 99, 2**31, 2**32 - 1])
def test_message_with_a_code_nobody_knows_is_never_taken_for_the_answer(wire: Wire, code: int) -> None:
    pod = wire.pod()
    assert answered(pod, (code, b"x"), (ERROR, b"")) == HYPERSTART_ERROR
    assert pod.pings()


def test_flood_of_events_does_not_hide_the_answer(wire: Wire) -> None:
    pod = wire.pod()
    assert answered(pod, *(EVENTS * 2_000), (ERROR, b"")) == HYPERSTART_ERROR
    assert pod.pings()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_answer_may_come_in_pieces(wire: Wire, size: int) -> None:
    pod = wire.pod()
    pod.client.hyper("ping")
    pod.vm.read_command()
    for piece in in_pieces(command(NEXT, NEXT_8) + command(ERROR, b"why"), size):
        pod.vm.ctl.sendall(piece)
    assert "why" in error_of(pod.client.receive())
    assert pod.pings()


def test_pipelined_commands_are_answered_in_order(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.send(request("hyper", {"hyperName": "ping"}) * 20 + request("x"))
    expected = []
    for number in range(20):
        pod.vm.read_command()
        pod.vm.say([ACK, ERROR][number % 2])
        expected.append([OK, HYPERSTART_ERROR][number % 2])
    assert [pod.client.receive() for _ in range(20)] == expected
    assert pod.client.receive() == refused("no payload named 'x'")


def test_one_transaction_at_a_time(wire: Wire) -> None:
    pod = wire.pod()
    clients = [wire.attached(pod) for _ in range(8)]
    for number, client in enumerate(clients):
        client.hyper("ping", str(number))
    taken = []
    for _ in clients:
        number = int(pod.vm.read_command().payload)
        assert wire.client().ask("x")  # long enough for a second command to be sent
        assert is_silent(pod.vm.ctl)
        pod.vm.say(ERROR, b"%d" % number)
        assert f"{number}" in error_of(clients[number].receive())
        taken.append(number)
    assert sorted(taken) == list(range(8))


def test_command_that_waits_stops_neither_streams_nor_other_payloads(wire: Wire) -> None:
    pod = wire.pod()
    pod.client.hyper("destroypod")
    pod.vm.read_command()
    other = wire.attached(pod)
    stream = other.allocate()
    pod.vm.send_frame(stream.base, b"out")
    assert stream.read_frame() == (stream.base, b"out")
    stream.send(b"in")
    assert pod.vm.read_frame() == (stream.base, b"in")
    pod.vm.say(ACK)
    assert pod.client.receive() == OK


def test_command_of_one_vm_does_not_wait_for_another_vm(wire: Wire) -> None:
    slow, quick = wire.pod(), wire.pod()
    slow.client.hyper("destroypod")
    slow.vm.read_command()
    assert quick.pings()
    assert is_silent(slow.client.sock)
    slow.vm.say(ACK)
    assert slow.client.receive() == OK
