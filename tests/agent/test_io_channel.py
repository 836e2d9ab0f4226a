"""The I/O channel: the bytes of docs/protocol.md, its limits, and what is lost by them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from pathlib import Path

import pytest

from cc_proxy.api.frames import FRAME_HEADER, Frame, FrameParser, encode_frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.frames import MAX_FROM_AGENT
from cc_proxy.linux.fds import unread
from tests.agent.conftest import MakeAgent
from tests.agent.host import MARKER, Host, connected, named, state_of, until, written_by
from tests.agent.running import AgentThread

OUT = bytes.fromhex("0000000000000003 0000000e") + b"A\n"
ERR = bytes.fromhex("0000000000000004 0000000e") + b"B\n"
END = bytes.fromhex("0000000000000003 0000000c0000000000000003 0000000d 07")
STDIN = bytes.fromhex("000000000000000b 00000012") + b"line1\n"
STDIN_EOF = bytes.fromhex("000000000000000b 0000000c")
#: More than all buffers between a process and its host hold.
TOO_MUCH = 2_000_000
#: The agent's buffer holds so many, so that none is dropped even if the host reads none meanwhile.
_ECHOES_WITH_ROOM = 833
assert _ECHOES_WITH_ROOM * FRAME_HEADER.size <= MAX_FROM_AGENT


def stop(host: Host) -> None:
    """Starts a container that counts its stdin, and stops it before it does."""
    host.start("sh", "-c", "echo $$; kill -STOP $$; exec wc -c")
    pid = int(host.read_frame().payload)
    until(lambda: state_of(pid) == "T")


def fill_pipe(host: Host) -> int:
    """Feeds a process that reads nothing more than there is room for; returns how much arrives of that."""
    host.feed_all(1, bytes(100_000))
    # A pipe takes no more once the last of its 16 pages has been begun; then the agent keeps 512 bytes.
    return 15 * 4096 + 512 + 512


def start_flood(host: Host) -> int:
    """Starts a container that writes `TOO_MUCH`; returns its pid once the agent's buffer is full of that."""
    host.start("sh", "-c", f"echo $$; read x; exec head -c {TOO_MUCH} /dev/zero")
    pid = int(host.read_frame().payload)
    host.feed(1, b"\n")
    until(lambda: is_held_up(host, pid))
    return pid


def is_held_up(host: Host, pid: int) -> bool:
    """Whether a process has written more than its pipe holds, and the agent takes no more of it."""
    written = written_by(pid)
    for _ in range(2):  # rounds of the agent, in each of which it would read on
        host.ok(Code.PING)
    return state_of(pid) == "S" and written_by(pid) == written > 65_536


# From the guest --------------------------------------------------------------------------------------


def test_the_bytes_of_output_and_end(host: Host) -> None:
    host.start("sh", "-c", "read x; echo A; read x; echo B >&2; read x; exit 7", stdio=3, stderr=4)
    for wanted in (OUT, ERR, END):
        host.feed(3, b"\n")
        assert host.io.read(len(wanted)) == wanted


def test_the_end_comes_in_one_piece(host: Host) -> None:
    host.start("sh", "-c", "exit 7", stdio=3, stderr=4)
    assert host.io.sock.recv(100) == END


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 0)])
def test_exit_status(host: Host, script: str, status: int) -> None:
    host.start("sh", "-c", script)
    assert host.run_to_end() == ({}, status)


def test_output_is_whole_and_in_frames_of_up_to_10240_bytes(host: Host, tmp_path: Path) -> None:
    content = os.urandom(TOO_MUCH)
    (tmp_path / "content").write_bytes(content)
    host.start("cat", str(tmp_path / "content"))
    frames: list[Frame] = []
    while not frames or frames[-1].payload:
        frames.append(host.read_frame())
    assert b"".join(frame.payload for frame in frames) == content
    assert max(len(frame.payload) for frame in frames) == 10_228


def test_a_host_that_does_not_read_stops_the_processes(host: Host) -> None:
    pid = start_flood(host)
    assert written_by(pid) < TOO_MUCH
    # Commands and stdin are not held up by it.
    host.ok(Code.PING)
    host.exec("true", stdio=3, stderr=4)
    host.ok(Code.KILL_CONTAINER, {"container": "c", "signal": 0})
    ends: dict[int, bytes] = {}
    total = 0
    while len(ends) < 2:
        frame = host.read_frame()
        total += len(frame.payload) * (frame.seq == 1)
        if not frame.payload:
            ends[frame.seq] = host.read_frame().payload
    assert total == TOO_MUCH
    assert ends == {1: b"\0", 3: b"\0"}


def test_ends_wait_for_room_too(host: Host) -> None:
    script = "echo $$; exec >&- 2>&-; read x; exit 6"
    host.start("sh", "-c", script, container="d", stdio=5, stderr=6)
    pid = int(host.read_frame().payload)
    until(lambda: not Path(f"/proc/{pid}/fd/2").exists())
    start_flood(host)
    host.exec("true", container="unknown", stdio=7, stderr=8)
    host.feed(5, b"\n")
    until(lambda: state_of(pid) == "Z")
    ends: dict[int, bytes] = {}
    while len(ends) < 3:
        frame = host.read_frame()
        if not frame.payload:
            ends[frame.seq] = host.read_frame().payload
    assert ends == {1: b"\0", 5: b"\x06", 7: b"\x7d"}


def test_a_frame_that_was_begun_is_not_finished_for_the_next_host(agent: AgentThread) -> None:
    with connected(agent.ctl, agent.io) as host:
        start_flood(host)
        host.io.read(1000)
    with Host(agent.ctl, agent.io) as host:
        output, status = host.run_to_end()
        assert status == 0
        assert set(output) == {1}
        assert len(output[1]) < TOO_MUCH
        assert not any(output[1])


def test_no_exit_is_reported_while_output_floods(host: Host) -> None:
    host.start("yes")
    for seq in (5, 7, 9):
        host.exec("yes", stdio=seq, stderr=seq + 1)
    # Nobody reads: each of them fills its pipe.
    until(lambda: len(named("yes")) == 4)
    floods = named("yes")
    until(lambda: all(state_of(pid) == "S" for pid in floods))
    host.exec("true", stdio=3, stderr=4)
    until(lambda: [state_of(pid) for pid in named("true")] == ["Z"])
    # For so long there is output without a pause, however slow they are.
    left = unread(host.io.sock) + MAX_FROM_AGENT + len(floods) * 32 * 1024
    while left > 0:
        frame = host.read_frame()
        assert frame.seq != 3
        left -= FRAME_HEADER.size + len(frame.payload)
    for pid in floods:
        os.kill(pid, signal.SIGKILL)
    frames: list[Frame] = []
    while len(frames) < 2:
        frame = host.read_frame()
        frames += [frame] if frame.seq == 3 else []
    assert frames == [Frame(3, b""), Frame(3, b"\0")]


# To the guest ----------------------------------------------------------------------------------------


def test_stdin_and_its_end(host: Host) -> None:
    host.start("sh", "-c", "cat; echo end", stdio=11, stderr=12)
    host.io.send(STDIN)
    host.read_until(11, b"line1\n")
    host.io.send(STDIN_EOF)
    assert host.run_to_end(11) == ({11: b"end\n"}, 0)


def test_stdin_in_pieces(host: Host) -> None:
    host.start("cat", stdio=11, stderr=12)
    for at in range(len(STDIN)):
        host.io.send(STDIN[at : at + 1])
        host.ok(Code.PING)
    host.read_until(11, b"line1\n")


def test_ten_frames_of_400_bytes_at_once(host: Host) -> None:
    host.start("wc", "-c")
    host.io.send(encode_frame(1, b"x" * 400) * 10 + encode_frame(1))
    assert host.run_to_end() == ({1: b"2560\n"}, 0)


@pytest.mark.parametrize(("size", "taken"), [(511, 511), (512, 512), (513, 512), (4084, 512)])
def test_512_bytes_of_a_frame_are_kept(host: Host, size: int, taken: int) -> None:
    host.start("wc", "-c")
    host.io.send(encode_frame(1, bytes(size)) + encode_frame(1))
    assert host.run_to_end() == ({1: b"%d\n" % taken}, 0)


def test_processes_do_not_share_the_512_bytes(host: Host) -> None:
    host.start("wc", "-c")
    host.exec("wc", "-c", stdio=3, stderr=4)
    host.io.send((encode_frame(1, bytes(400)) + encode_frame(3, bytes(400))) * 5)
    host.io.send(encode_frame(3))
    assert host.run_to_end(3) == ({3: b"2000\n"}, 0)
    host.io.send(encode_frame(1))
    assert host.run_to_end(1) == ({1: b"2000\n"}, 0)


def test_lossless_stdin(host: Host) -> None:
    content = os.urandom(200_000)
    host.start("md5sum")
    host.feed_all(1, content)
    host.feed(1)
    output, _ = host.run_to_end()
    assert output[1].split()[0].decode() == hashlib.md5(content).hexdigest()


def test_stdin_is_handled_when_as_many_commands_are_answered_as_frames_were_sent_and_one_more(
    host: Host, tmp_path: Path
) -> None:
    content, copy = os.urandom(50_000), tmp_path / "copy"
    host.start("sh", "-c", f"exec cat >{copy}", stdio=3, stderr=4)
    host.feed(3, b"up")
    until(lambda: copy.exists() and copy.read_bytes() == b"up")
    host.exec("yes", stdio=1, stderr=2)
    host.io.sock.setblocking(False)
    for start in range(0, len(content), 512):
        host.feed(3, content[start : start + 512])
        for _ in range(2):
            host.ok(Code.PING)
            with contextlib.suppress(BlockingIOError):
                while host.io.sock.recv(65_536):
                    pass
    until(lambda: copy.read_bytes() == b"up" + content)


def test_what_does_not_fit_behind_a_full_pipe_is_lost(host: Host) -> None:
    stop(host)
    total = fill_pipe(host)
    host.feed(1)
    host.kill(signal.SIGCONT)
    assert host.run_to_end() == ({1: b"%d\n" % total}, 0)


def test_the_end_of_stdin_waits_for_what_is_before_it(host: Host) -> None:
    stop(host)
    total = fill_pipe(host)
    host.io.send(encode_frame(1) + encode_frame(1, bytes(100)))
    host.fence()
    host.kill(signal.SIGCONT)
    assert host.run_to_end() == ({1: b"%d\n" % total}, 0)


def test_stdin_of_who_does_not_read_it(host: Host) -> None:
    host.start("sh", "-c", "exec <&-; echo closed; sleep 100")
    host.read_until(1, b"closed\n")
    host.feed(1, b"x")
    host.feed(1, b"y")
    host.feed(1)
    host.fence()


# The limit of a frame --------------------------------------------------------------------------------


def test_a_frame_of_4096_bytes_is_read(host: Host) -> None:
    host.start("wc", "-c")
    host.io.send(encode_frame(1, bytes(4084)))
    host.fence()


@pytest.mark.parametrize("sent", [4097, 12])
def test_a_longer_one_is_a_panic(host: Host, agent: AgentThread, sent: int) -> None:
    host.start("sh", "-c", "echo $$; exec sleep 100")
    pid = int(host.read_frame().payload)
    host.io.send(encode_frame(1, bytes(4085))[:sent])
    assert host.io.rest() == b""
    assert host.ctl.rest() == b""
    assert not state_of(pid)
    agent.join()
    assert "4097 bytes" in str(agent.panic)
    assert not agent.ctl.exists()


# Frames on a seq that no process owns ----------------------------------------------------------------


def test_strays_come_back_empty(host: Host) -> None:
    host.start("cat")
    host.io.send(encode_frame(5, b"unknown") + encode_frame(2, b"stderr") + encode_frame(MARKER))
    wanted = encode_frame(5) + encode_frame(2) + encode_frame(MARKER)
    assert host.io.read(len(wanted)) == wanted
    host.feed(1)
    assert host.run_to_end() == ({}, 0)
    host.fence(1)


def test_an_echo_comes_after_what_was_before_it(host: Host) -> None:
    host.start("true")
    assert host.run_to_end() == ({}, 0)
    for first in range(1, 4999, _ECHOES_WITH_ROOM):
        seqs = range(first, first + _ECHOES_WITH_ROOM)
        host.io.send(b"".join(encode_frame(seq, b"x") for seq in seqs))
        wanted = b"".join(map(encode_frame, seqs))
        assert host.io.read(len(wanted)) == wanted


def test_no_echo_without_room_for_it(host: Host, agent: AgentThread) -> None:
    start_flood(host)
    host.feed(MARKER)
    host.ok(Code.PING)  # was sent later and so is taken later
    frames: list[Frame] = []
    parser = FrameParser()
    while not frames or len(frames[-1].payload) != 1:
        frames += parser.receive_data(host.io.sock.recv(65536))
    assert {frame.seq for frame in frames} == {1}
    host.fence()


# Quirks ----------------------------------------------------------------------------------------------


def test_no_echo(make_agent: MakeAgent) -> None:
    agent = make_agent(no_echo=True)
    with connected(agent.ctl, agent.io) as host:
        host.start("cat")
        host.io.send(encode_frame(MARKER) + encode_frame(1, b"x"))
        assert host.read_frame() == Frame(1, b"x")


def test_drop_echoes(make_agent: MakeAgent) -> None:
    agent = make_agent(drop_echoes=2)
    with connected(agent.ctl, agent.io) as host:
        host.io.send(b"".join(encode_frame(MARKER + n) for n in range(3)))
        assert host.io.read(FRAME_HEADER.size) == encode_frame(MARKER + 2)


def test_never_ready(make_agent: MakeAgent) -> None:
    agent = make_agent(never_ready=True)
    with Host(agent.ctl, agent.io) as host:
        host.send(Code.PING)
        host.feed(MARKER)
        host.io.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            host.io.read(1)
        assert host.ctl.silent


def test_skip_ready(make_agent: MakeAgent) -> None:
    agent = make_agent(skip_ready=True)
    with Host(agent.ctl, agent.io) as host:
        host.ok(Code.PING)
        assert host.events == []


def test_ready_delay(make_agent: MakeAgent) -> None:
    agent = make_agent(ready_delay=0.1)
    with Host(agent.ctl, agent.io) as host:
        host.send(Code.PING)
        host.feed(MARKER)
        assert host.ctl.silent
        assert host.io.silent
    # What was sent before the boot is looked at after it; READY is for who is there by then.
    with Host(agent.ctl, agent.io) as host:
        host.wait_ready()
        host.ok(Code.PING)
        host.fence()


def test_async_events(make_agent: MakeAgent) -> None:
    agent = make_agent(async_events=True)
    with connected(agent.ctl, agent.io) as host:
        host.start("true")
        host.run_to_end()
        host.ok(Code.PING)
        codes = [event.code for event in host.events]
        assert codes == [Code.PROCESS_ASYNC_EVENT] * 2 + [Code.FINISH_POD, Code.PROCESS_ASYNC_EVENT]
