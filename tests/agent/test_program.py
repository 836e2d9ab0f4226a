"""The agent as a program: its sockets, its signals, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cc_proxy.agent import Agent, CannotListen, Quirks, run_agent
from cc_proxy.hyperstart.codes import Code
from tests.agent.host import Channel, Host, children_of, connected, process, state_of, until
from tests.agent.running import AgentProgram

CHECKOUT = str(Path(__file__).parents[2])
GIVES_BACK = """
import os, signal, socket
from cc_proxy.agent import run_agent

ctl = socket.socket(socket.AF_UNIX)

def power_off():
    ctl.connect("ctl")
    ctl.send(bytes.fromhex("00000004 00000008"))

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.listdir("/proc/self/fd")

before = state()
assert run_agent("ctl", "io", on_listening=power_off) == 0
assert state() == before
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_all_processes(program: AgentProgram, number: signal.Signals) -> None:
    with connected(program.ctl, program.io) as host:
        host.start("sh", "-c", "trap '' TERM INT; setsid sleep 1000 & echo $! $$; wait")
        pids = [int(pid) for pid in host.read_frame().payload.split()]
        program.popen.send_signal(number)
        assert program.wait() == (0, "")
        assert [state_of(pid) for pid in pids] == ["", ""]
        assert host.ctl.rest() == b""
        assert host.io.rest() == b""
    assert not program.ctl.exists()
    assert not program.io.exists()


def test_power_off(program: AgentProgram) -> None:
    with connected(program.ctl, program.io) as host:
        host.start("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!; exec sleep 1000")
        orphan = int(host.read_frame().payload)
        host.ok(Code.DESTROY_POD)
        assert host.ctl.rest() == b""
        assert program.wait() == (0, "")
        assert state_of(orphan) == ""
    assert not program.ctl.exists()


def test_panic(program: AgentProgram) -> None:
    with connected(program.ctl, program.io) as host:
        host.io.send(bytes.fromhex("0000000000000001 00002000"))
        assert host.io.rest() == b""
        status, said = program.wait()
        assert status == 2
        assert said == "cc-proxy agent: panic: a frame of 8192 bytes on stream 1 of the I/O channel\n"
    assert not program.ctl.exists()


def test_each_refusal_has_a_line_that_says_why(program: AgentProgram) -> None:
    with connected(program.ctl, program.io) as host:
        host.refused(Code.START_POD, b'{"color":"red"}')
        host.refused(Code.NEW_CONTAINER, {"id": "c", "process": process("no\nsuch")})
        host.refused(Code.NEW_CONTAINER, {"id": "c", "process": process("")})
        host.refused(Code.NEW_CONTAINER, {"id": "c", "process": process("true", workdir="/no/such")})
        host.refused(Code.KILL_CONTAINER, {"container": "x", "signal": 9})
        host.refused(Code.GET_POD)
        host.start("cat")
        host.refused(Code.READ_FILE, {"container": "c", "file": "/no/such"})
        host.ok(Code.DESTROY_POD)
    _, said = program.wait()
    assert said.splitlines() == [
        "cc-proxy agent: startpod: Object contains unknown field `color`",
        r"cc-proxy agent: newcontainer: no program 'no\nsuch'",
        "cc-proxy agent: newcontainer: no program ''",
        "cc-proxy agent: newcontainer: no directory '/no/such'",
        "cc-proxy agent: killcontainer: no container x",
        "cc-proxy agent: getpod: not a command for this agent",
        "cc-proxy agent: readfile: /no/such: No such file or directory",
    ]


def test_refusals_without_end_do_not_fill_a_log(program: AgentProgram) -> None:
    with connected(program.ctl, program.io) as host:
        for _ in range(1000):
            host.refused(Code.EXEC_CMD, {"container": "x" * 2000})
        host.ok(Code.DESTROY_POD)
    _, said = program.wait()
    assert 100 <= len(said.splitlines()) < 500
    assert max(map(len, said.splitlines())) < 600


def test_orphans_are_waited_for(program_host: Host, program: AgentProgram) -> None:
    host = program_host
    host.start("cat")
    # The one in the middle ends at once, and what it leaves does with it.
    host.exec("sh", "-c", "sh -c 'sh -c : &'; sh -c 'sleep 1000 >/dev/null 2>&1 &'", stdio=3, stderr=4)
    assert host.run_to_end(3) == ({}, 0)

    def all_there() -> bool:
        host.exec("true", stdio=3, stderr=4)
        host.run_to_end(3)
        return sorted(map(state_of, children_of(program.popen.pid))) == ["S", "S"]

    until(all_there)


def test_processes_begin_with_default_signals(tmp_sock_dir: Path) -> None:
    # What a shell does to programs in the background, and nohup.
    ignoring = ("env", "--ignore-signal=INT,QUIT,HUP,CHLD", "--block-signal=USR1")
    with AgentProgram(tmp_sock_dir, Quirks(), prefix=ignoring) as program:
        with connected(program.ctl, program.io) as host:
            host.start("sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status; exit 3")
            output, status = host.run_to_end()
            masks = {int(line.split()[1], 16) for line in output[1].splitlines()}
            # 32 and 33 are the C library's own; whatever was inherited of them cannot be changed.
            assert {mask & ~(0b11 << 31) for mask in masks} == {0}
            assert status == 3
        program.popen.send_signal(signal.SIGHUP)
        program.popen.send_signal(signal.SIGINT)
        assert program.wait() == (0, "")


def test_it_does_not_spin(program_host: Host, program: AgentProgram) -> None:
    host = program_host
    host.start("sh", "-c", "exec >&- 2>&-; read x")
    host.fence()
    host.io.close()
    host.ok(Code.PING)
    pid = program.popen.pid
    until(lambda: state_of(pid) == "S")
    before = cpu_ticks(pid)
    host.ok(Code.PING)
    threading.Event().wait(0.1)
    assert cpu_ticks(pid) - before <= 2


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# Sockets ---------------------------------------------------------------------------------------------


def test_it_can_be_stopped_by_another_thread(tmp_sock_dir: Path) -> None:
    with Agent(tmp_sock_dir / "ctl", tmp_sock_dir / "io") as agent:
        thread = threading.Thread(target=agent.serve)
        thread.start()
        with connected(tmp_sock_dir / "ctl", tmp_sock_dir / "io") as host:
            host.start("sleep", "1000")
            agent.stop()
            thread.join()
            assert host.io.rest() == b""
        agent.stop()
    assert os.listdir(tmp_sock_dir) == []


def test_hosts_can_connect_before_it_serves(tmp_sock_dir: Path) -> None:
    with Agent(tmp_sock_dir / "ctl", tmp_sock_dir / "io") as agent, Channel(tmp_sock_dir / "ctl") as ctl:
        ctl.send(bytes.fromhex("00000004 00000008"))
        agent.serve()
        assert ctl.rest()[:8] == bytes.fromhex("00000008 00000008")


def test_run_agent_gives_back_what_it_took(tmp_sock_dir: Path) -> None:
    # In a process of its own, because it takes the children of the process too.
    command = [sys.executable, "-c", GIVES_BACK]
    subprocess.run(command, cwd=tmp_sock_dir, env={"PYTHONPATH": CHECKOUT}, check=True)
    assert os.listdir(tmp_sock_dir) == []


def test_a_path_in_use(program: AgentProgram, tmp_sock_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_agent(tmp_sock_dir / "new", program.io) == 1
    assert (
        capsys.readouterr().err
        == f"cc-proxy agent: {program.io}: another process serves this socket; it was left alone\n"
    )
    assert not (tmp_sock_dir / "new").exists()
    # The one that was there has not even noticed: READY has not been used up.
    with connected(program.ctl, program.io) as host:
        host.fence()


def test_one_path_for_both(tmp_sock_dir: Path) -> None:
    with pytest.raises(CannotListen):
        Agent(tmp_sock_dir / "a", tmp_sock_dir / "a")
    assert os.listdir(tmp_sock_dir) == []


def test_a_path_that_is_too_long(tmp_sock_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longest = str(tmp_sock_dir / "é").ljust(106, "x")
    assert len(os.fsencode(longest)) == 107
    Agent(longest, tmp_sock_dir / "io").close()
    assert run_agent(longest + "x", tmp_sock_dir / "io") == 1
    assert "108 bytes is too long for a socket (107 at most)" in capsys.readouterr().err


def test_a_stale_socket_is_replaced(tmp_sock_dir: Path) -> None:
    for name in ("ctl", "io"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(tmp_sock_dir / name))
    with Agent(tmp_sock_dir / "ctl", tmp_sock_dir / "io"), Channel(tmp_sock_dir / "ctl"):
        pass
    assert os.listdir(tmp_sock_dir) == []


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(
    tmp_sock_dir: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_sock_dir / "io"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_sock_dir / "nowhere")
    assert run_agent(tmp_sock_dir / "ctl", path) == 1
    assert (
        capsys.readouterr().err
        == f"cc-proxy agent: {path}: there is something that is not a socket; it was left alone\n"
    )
    assert os.listdir(tmp_sock_dir) == ["io"]


def test_no_such_directory(tmp_sock_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_sock_dir / "no" / "ctl"
    assert run_agent(path, tmp_sock_dir / "io") == 1
    assert capsys.readouterr().err == f"cc-proxy agent: {path}: No such file or directory\n"


def test_a_socket_that_took_its_place_is_not_removed(tmp_sock_dir: Path) -> None:
    with Agent(tmp_sock_dir / "ctl", tmp_sock_dir / "io"), socket.socket(socket.AF_UNIX) as other:
        (tmp_sock_dir / "io").unlink()
        other.bind(str(tmp_sock_dir / "io"))
    assert os.listdir(tmp_sock_dir) == ["io"]


def test_relative_paths(tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_sock_dir)
    with Agent("ctl", "io"), Channel(Path("ctl")):
        assert sorted(os.listdir()) == ["ctl", "io"]
    assert os.listdir() == []
