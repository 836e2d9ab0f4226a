"""The control channel: the bytes of docs/protocol.md, and who may talk when."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from cc_proxy.api.frames import Frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import ControlMessage, encode
from tests.agent.host import ACK, ERROR, READY, Channel, Host, connected, named, next_, process, until
from tests.agent.running import AgentThread

# What a shell's trap does, without the moments in which a signal comes too early for it.
ENDS_BY_SIGTERM = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("up", flush=True)
signal.sigwait([signal.SIGTERM])
print("bye", flush=True)
raise SystemExit(3)
"""

PING = bytes.fromhex("0000000c 0000000a 7b7d")
PONG = next_(8, 2) + ACK
VERSION = bytes.fromhex("00000000 00000008")
VERSION_ANSWER = bytes.fromhex("0000000e 0000000c 0000000800000009 0000000c 00001092")


def test_ready(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        assert ctl.read(8) == READY


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        pytest.param(VERSION, VERSION_ANSWER, id="version"),
        pytest.param(PING, PONG, id="ping"),
        pytest.param(encode(Code.PING), next_(8) + ACK, id="ping without body"),
        pytest.param(encode(Code.PING, b"\xff" * 10), next_(8, 10) + ACK, id="ping with anything"),
        pytest.param(encode(Code.VERSION, b"{}"), next_(8, 2) + VERSION_ANSWER[12:], id="version with body"),
        pytest.param(encode(Code.START_POD, b"?"), next_(8, 1) + ERROR, id="no JSON"),
        pytest.param(encode(99), next_(8) + ERROR, id="unknown code"),
        pytest.param(encode(Code.READY), next_(8) + ERROR, id="the agent's own code"),
        pytest.param(encode(Code.GET_POD), next_(8) + ERROR, id="not for this agent"),
        pytest.param(bytes.fromhex("0000000c 00000000"), next_(8) + ACK, id="length 0"),
        pytest.param(bytes.fromhex("0000000c 00000004"), next_(8) + ACK, id="length 4"),
    ],
)
def test_answers(agent: AgentThread, command: bytes, answer: bytes) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.send(command)
        assert ctl.read(8 + len(answer)) == READY + answer


def test_readfile(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello file")
    host.start("sleep", "100")
    host.send(Code.READ_FILE, {"container": "c", "file": str(tmp_path / "file")})
    size = len(json.dumps({"container": "c", "file": str(tmp_path / "file")}))
    wanted = next_(8, size) + bytes.fromhex("00000009 00000012 68656c6c6f2066696c65")
    assert host.ctl.read(len(wanted)) == wanted


def test_each_read_has_its_next(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.read(8)
        for piece in (PING[:3], PING[3:8], PING[8:9]):
            ctl.send(piece)
            assert ctl.read(12) == next_(len(piece))
        assert ctl.silent
        ctl.send(PING[9:])
        assert ctl.read(20) == next_(1) + ACK


def test_a_header_is_read_without_what_follows(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.read(8)
        ctl.send(PING[:9])
        assert ctl.read(24) == next_(8, 1)


def test_pipelined_commands_are_answered_in_order(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.send(VERSION + PING + encode(99) + VERSION)
        wanted = READY + VERSION_ANSWER + PONG + next_(8) + ERROR + VERSION_ANSWER
        assert ctl.read(len(wanted)) == wanted


def test_a_host_that_reads_no_answers_gets_them_all_later(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ctl.read(8)
        sent, offset = 0, 0
        ctl.sock.setblocking(False)
        try:
            while True:
                offset = ctl.sock.send(PING[offset:]) + offset
                if offset == len(PING):
                    sent, offset = sent + 1, 0
        except BlockingIOError:
            assert offset == 0
        ctl.sock.setblocking(True)
        assert ctl.read(sent * len(PONG)) == sent * PONG


def test_ready_comes_once_per_boot(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        assert ctl.read(8) == READY
    with Channel(agent.ctl) as ctl:
        ctl.send(PING)
        assert ctl.read(len(PONG)) == PONG


def test_answers_to_a_host_that_left_are_not_the_next_ones(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.send(VERSION * 10)
        ctl.read(8)
    with Channel(agent.ctl) as ctl:
        ctl.send(PING)
        assert ctl.read(len(PONG)) == PONG


def test_a_second_host_connects_and_nothing_answers(agent: AgentThread) -> None:
    with Channel(agent.ctl) as first, Channel(agent.ctl) as second:
        second.send(PING)
        first.read(8)
        first.send(PING)
        assert first.read(len(PONG)) == PONG
        assert second.silent
        first.close()
        assert second.read(len(PONG)) == PONG


def test_the_second_on_the_io_socket_waits_too(host: Host, agent: AgentThread) -> None:
    with Channel(agent.io) as second:
        second.send(bytes.fromhex("8000000000000001 0000000c"))
        host.fence()
        assert second.silent
        host.io.close()
        assert second.read(12) == bytes.fromhex("8000000000000001 0000000c")


def test_output_waits_for_the_host(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.send(encode(Code.START_POD, b"{}"))
        command = json.dumps({"id": "c", "process": process("echo", "A")}).encode()
        ctl.send(encode(Code.NEW_CONTAINER, command))
        wanted = READY + next_(8, 2) + ACK + next_(8, len(command)) + ACK
        assert ctl.read(len(wanted)) == wanted
        until(lambda: not named("echo"))
        with Channel(agent.io) as io:
            assert io.read(39) == bytes.fromhex(
                "0000000000000001 0000000e 410a0000000000000001 0000000c0000000000000001 0000000d 00"
            )


def test_containers_survive_their_host(agent: AgentThread) -> None:
    with connected(agent.ctl, agent.io) as host:
        host.start("cat")
        host.feed(1, b"one")
        host.read_until(1, b"one")
    with Host(agent.ctl, agent.io) as host:
        host.feed(1, b"two")
        host.read_until(1, b"two")
        host.refused(Code.START_POD, b"{}")
        host.feed(1)
        assert host.run_to_end() == ({}, 0)


def test_the_receive_buffer_takes_10240_bytes(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.read(8)
        ctl.send(encode(Code.PING, b" " * (10_240 - 8)))
        answer = b""
        while not answer.endswith(ACK):
            answer += ctl.read(4)
        sizes = [int.from_bytes(answer[at + 8 : at + 12], "big") for at in range(0, len(answer) - 8, 12)]
        assert sum(sizes) == 10_240


def test_a_longer_command_is_a_panic(host: Host, agent: AgentThread) -> None:
    host.start("sleep", "100")
    host.ctl.send(encode(Code.PING, b" " * (10_241 - 8)))
    assert host.ctl.rest() == next_(8)
    assert host.io.rest() == b""
    agent.join()
    assert "10241 bytes" in str(agent.panic)


# destroypod ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b'""', b"{}"])
def test_destroypod(host: Host, agent: AgentThread, body: bytes) -> None:
    host.start("sleep", "100")
    host.exec(sys.executable, "-ISc", ENDS_BY_SIGTERM, stdio=3, stderr=4)
    host.read_until(3, b"up\n")
    host.ok(Code.DESTROY_POD, body)
    assert host.ctl.rest() == b""
    frames = bytes.fromhex(
        "0000000000000001 0000000c"
        "0000000000000001 0000000d 00"
        "0000000000000003 00000010"
        "6279650a"
        "0000000000000003 0000000c"
        "0000000000000003 0000000d 03"
    )
    assert sorted(host.io.rest()) == sorted(frames)
    agent.join()
    assert agent.panic is None
    assert not agent.ctl.exists()
    assert not agent.io.exists()


def test_destroypod_without_a_pod(agent: AgentThread) -> None:
    with Channel(agent.ctl) as ctl:
        ctl.send(encode(Code.DESTROY_POD))
        assert ctl.rest() == READY + next_(8) + ACK


def test_destroypod_by_who_does_not_wait(host: Host, agent: AgentThread) -> None:
    host.start("sleep", "100")
    host.send(Code.DESTROY_POD, b'""')
    host.ctl.close()
    assert host.run_to_end() == ({}, 0)
    assert host.io.rest() == b""
    agent.join()
    assert agent.panic is None


def test_destroypod_is_not_answered_while_sigterm_is_ignored(host: Host, agent: AgentThread) -> None:
    host.start("sh", "-c", "trap '' TERM; echo up; exec cat")
    host.read_until(1, b"up\n")
    host.start("sleep", "100", container="d", stdio=3, stderr=4)
    host.send(Code.DESTROY_POD, b"{}")
    host.send(Code.PING, b"{}")
    assert host.run_to_end(3) == ({}, 0)
    host.feed(1, b"still here\n")
    host.read_until(1, b"still here\n")
    assert host.ctl.read(24) == next_(8, 2)
    assert host.ctl.silent
    host.feed(1)
    assert host.run_to_end() == ({}, 0)
    # That is the last answer: the ping goes down with the VM.
    assert host.ctl.rest() == ACK


def test_exits_are_reported_before_the_answer(host: Host) -> None:
    host.start("sleep", "100")
    host.send(Code.DESTROY_POD)
    assert host.answer() == ControlMessage(Code.ACK)
    assert not host.io.silent
    assert host.read_frame() == Frame(1, b"")
