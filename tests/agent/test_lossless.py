"""A lossless agent: nothing that the host sends is thrown away, and what is not taken is not acknowledged."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from cc_proxy.api.frames import Frame, encode_frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.pacing import LOSSLESS
from tests.agent.conftest import MakeAgent
from tests.agent.host import MARKER, PATIENCE, Channel, Host, connected, state_of, until
from tests.agent.running import AgentThread

#: More than pipe, socket and agent hold together.
TOO_MUCH = 2_000_000


@pytest.fixture
def agent(make_agent: MakeAgent) -> AgentThread:
    return make_agent(lossless=True)


@pytest.fixture
def host(agent: AgentThread) -> Iterator[Host]:
    with connected(agent.ctl, agent.io) as host:
        host.wait_lossless()
        yield host


def start_stopped(host: Host, *args: str) -> None:
    """Starts a container, stopped before it runs a program."""
    host.start("sh", "-c", 'echo $$; kill -STOP $$; exec "$@"', "-", *args)
    pid = int(host.read_frame().payload)
    until(lambda: state_of(pid) == "T")


def marker_of(seq: int) -> int:
    return 2**63 + seq


def test_each_host_is_told(agent: AgentThread) -> None:
    for _ in range(2):
        with Channel(agent.io) as io:
            assert io.read(13) == bytes.fromhex("8000000000000000 0000000d 01")


def test_a_host_that_asks_for_the_version_is_told_again(host: Host) -> None:
    assert host.ok(Code.VERSION) == bytes.fromhex("00001092")
    assert host.read_frame() == Frame(2**63, LOSSLESS)


def test_a_frame_of_no_process_that_is_no_marker_comes_back_empty(host: Host) -> None:
    host.feed(99, b"x")
    assert host.read_frame() == Frame(99, b"")


def test_a_marker_that_is_sent_again_comes_back_once(host: Host) -> None:
    start_stopped(host, "wc", "-c")
    host.io.send(encode_frame(1, bytes(4_000)) * 20 + encode_frame(marker_of(1)) * 3)
    for _ in range(4):  # rounds of the agent, each of which reads 64 KiB
        host.ok(Code.PING)
    host.kill(signal.SIGCONT)
    assert host.read_frame() == Frame(marker_of(1), LOSSLESS)
    host.feed(1)
    assert host.run_to_end() == ({1: b"80000\n"}, 0)


def test_what_is_not_taken_is_kept_and_not_acknowledged(host: Host) -> None:
    content = os.urandom(60_000 + 5_000)
    start_stopped(host, "md5sum")
    for start in range(0, 60_000, 500):
        host.feed(1, content[start : start + 500])
        host.fence(marker_of(1))
    # The pipe is full somewhere in this.
    host.io.send(encode_frame(1, content[60_000:62_500]) + encode_frame(1, content[62_500:]))
    host.feed(marker_of(1))
    # Others are not held up, nor is a marker of no process.
    host.exec("sh", "-c", "read x; echo $x", stdio=3, stderr=4)
    host.feed(3, b"A\n")
    host.fence(marker_of(3) + (1 << 53))
    assert host.run_to_end(3) == ({3: b"A\n"}, 0)
    host.fence(marker_of(99))
    assert host.io.silent
    host.kill(signal.SIGCONT)
    assert host.read_frame() == Frame(marker_of(1), LOSSLESS)
    host.feed(1)
    output, _ = host.run_to_end()
    assert output[1].split()[0].decode() == hashlib.md5(content).hexdigest()


def test_a_host_that_does_not_wait_is_made_to(host: Host) -> None:
    content = os.urandom(TOO_MUCH)
    start_stopped(host, "md5sum")
    data = b"".join(encode_frame(1, content[at : at + 4000]) for at in range(0, TOO_MUCH, 4000))
    sender = threading.Thread(target=host.io.send, args=[data + encode_frame(1)], name="sender")
    sender.start()
    try:
        host.ok(Code.PING)
        assert sender.is_alive()
    finally:
        host.kill(signal.SIGCONT)
        sender.join()
    output, _ = host.run_to_end()
    assert output[1].split()[0].decode() == hashlib.md5(content).hexdigest()


def test_frames_of_8192_bytes_are_taken(host: Host) -> None:
    host.start("wc", "-c")
    host.io.send(encode_frame(1, bytes(8_180)) * 3 + encode_frame(1))
    assert host.run_to_end() == ({1: b"24540\n"}, 0)


@pytest.mark.parametrize("how", ["closes its stdin", "ends"])
def test_what_will_never_be_taken_is_acknowledged(host: Host, how: str) -> None:
    then = "exec <&-; echo closed; sleep 100" if how == "closes its stdin" else "exit 3"
    start_stopped(host, "sh", "-c", then)
    host.io.send(encode_frame(1, bytes(4_000)) * 25 + encode_frame(marker_of(1)))
    host.ok(Code.PING)
    assert host.io.silent
    host.kill(signal.SIGCONT)
    said = Frame(1, b"closed\n") if how == "closes its stdin" else Frame(1, b"\3")
    frames: set[Frame] = set()
    while not frames >= {said, Frame(marker_of(1), LOSSLESS)}:
        frames.add(host.read_frame())


def test_a_marker_comes_back_while_output_floods(host: Host) -> None:
    host.start("sh", "-c", "echo $$; exec yes")
    host.exec("cat", stdio=3, stderr=4)
    for generation in range(20):
        marker = marker_of(3) + (generation << 53)
        host.feed(marker)
        while host.read_frame().seq != marker:
            pass


def test_an_exit_is_reported_while_output_floods(host: Host) -> None:
    host.start("yes")
    host.exec("sh", "-c", "exit 5", stdio=3, stderr=4)
    frames: list[Frame] = []
    while len(frames) < 2:
        frame = host.read_frame()
        frames += [frame] if frame.seq == 3 else []
    assert frames == [Frame(3, b""), Frame(3, b"\x05")]


def test_a_host_that_reads_no_answers_is_not_read_without_bound(host: Host) -> None:
    marker, number = encode_frame(MARKER, LOSSLESS), 200_000
    taken = send_what_is_taken(host, marker * number)
    assert taken < number * len(marker)
    assert host.io.read(taken // len(marker) * len(marker)) == marker * (taken // len(marker))


def send_what_is_taken(host: Host, data: bytes) -> int:
    """Sends data until the agent reads no more of it; returns how much it, and the socket, have taken."""
    sent = rounds = 0
    host.io.sock.setblocking(False)
    while sent < len(data) and rounds < 5:
        try:
            sent += host.io.sock.send(data[sent:])
            rounds = 0
        except BlockingIOError:
            host.ok(Code.PING)  # another round of the agent, in which it would read on
            rounds += 1
    host.io.sock.settimeout(PATIENCE)
    return sent
