"""The commands a pod needs: their JSON, what they do, and what is an ERROR."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.agent import commands, credentials
from cc_proxy.api.frames import Frame
from cc_proxy.hyperstart.codes import Code
from tests.agent.conftest import MakeAgent
from tests.agent.host import PATIENCE, Channel, Host, process, state_of, until
from tests.agent.running import AgentThread
from tests.users import needs_root

CONTAINER = {"id": "c", "process": process("true")}


@pytest.fixture
def bare_host(agent: AgentThread) -> Any:
    """A host without a pod."""
    with Host(agent.ctl, agent.io) as host:
        host.wait_ready()
        yield host


# startpod --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"hostname":"h","containers":[],"shareDir":"rootfs","interfaces":[],"routes":[]}',
        b'{"hostname":"h","dns":["1.1.1.1"],"portmappingWhiteLists":{"a":[1]},"interfaces":[{"device":"eth0"}]}',
        b"{}",
    ],
)
def test_startpod(bare_host: Host, body: bytes) -> None:
    bare_host.ok(Code.START_POD, body)
    bare_host.refused(Code.START_POD, body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"hostname":"h","color":"red"}',
        b'{"share_dir":"rootfs"}',
        b'{"hostname":5}',
        b'{"hostname":null}',
        b'{"containers":{}}',
        b'{"containers":[{}]}',
        b"[]",
        b"",
        b"{",
        b'{"hostname":"\xff"}',
        b'{"containers":' + b"[" * 10_000,
    ],
)
def test_startpod_refused(bare_host: Host, body: bytes) -> None:
    bare_host.refused(Code.START_POD, body)
    bare_host.ok(Code.START_POD, b"{}")


@pytest.mark.parametrize("code", [Code.NEW_CONTAINER, Code.EXEC_CMD])
def test_nothing_runs_without_a_pod(bare_host: Host, code: Code) -> None:
    key = "id" if code == Code.NEW_CONTAINER else "container"
    bare_host.refused(code, {key: "c", "process": process("true")})
    bare_host.fence()


def test_the_pod_is_gone_with_its_last_container(host: Host) -> None:
    host.start("sh", "-c", "read x")
    host.start("sh", "-c", "read x", container="d", stdio=3, stderr=4)
    host.feed(1)
    host.run_to_end(1)
    host.refused(Code.START_POD, b"{}")
    host.feed(3)
    host.run_to_end(3)
    host.refused(Code.NEW_CONTAINER, CONTAINER)
    host.refused(Code.EXEC_CMD, {"container": "c", "process": process("true")})
    host.start_pod()
    host.start("true")


def test_what_was_executed_ends_with_its_container(host: Host) -> None:
    host.start("cat")
    host.exec("sleep", "100", stdio=3, stderr=4)
    host.feed(1)
    assert host.run_to_end(1) == ({}, 0)
    assert host.run_to_end(3) == ({}, 0)


# newcontainer and execcmd ----------------------------------------------------------------------------


def test_newcontainer_with_everything(host: Host) -> None:
    host.ok(
        Code.NEW_CONTAINER,
        {
            "id": "c",
            "rootfs": "rootfs",
            "image": "i",
            "process": process("echo", "A", envs=[], workdir="/", rows=1, columns=1, user="", group=""),
            "fsmap": [{"source": "a", "path": "b", "readOnly": True}],
            "restartPolicy": "never",
            "initialize": False,
        },
    )
    assert host.run_to_end() == ({1: b"A\n"}, 0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"color": "red"}, id="unknown key"),
        pytest.param({"id": ""}, id="no id"),
        pytest.param({"id": 5}, id="id of the wrong type"),
        pytest.param({"initialize": "no"}, id="bool of the wrong type"),
        pytest.param({"process": process("true", color="red")}, id="unknown key of the process"),
        pytest.param({"process": process("true", terminal=1)}, id="terminal of the wrong type"),
        pytest.param({"process": process("true", stdio=0)}, id="stdio 0"),
        pytest.param({"process": process("true", stdio=-1)}, id="stdio negative"),
        pytest.param({"process": process("true", stdio=2**64)}, id="stdio too large"),
        pytest.param({"process": process("true", stderr=0)}, id="stderr 0"),
        pytest.param({"process": process("true", stdio=2)}, id="stderr the same"),
        pytest.param({"process": process("true", stderr=0, stdio=0, terminal=True)}, id="terminal, stdio 0"),
        pytest.param({"process": process("true", rows=65_536)}, id="rows too large"),
        pytest.param({"process": process()}, id="no args"),
        pytest.param({"process": process("")}, id="empty name"),
        pytest.param({"process": process("true", "a\0b")}, id="NUL in args"),
        pytest.param({"process": process("true", envs=[{"env": "A=B", "value": ""}])}, id="= in a variable"),
        pytest.param({"process": process("true", envs=[{"env": "A"}])}, id="no value"),
        pytest.param({"process": process("true", workdir="/no/such")}, id="no workdir"),
        pytest.param({"process": process("true", workdir="/etc/passwd")}, id="workdir a file"),
        pytest.param({"process": process("/etc/passwd")}, id="not executable"),
        pytest.param({"process": process("/etc")}, id="a directory"),
        pytest.param({"process": process("/no/such")}, id="missing binary"),
        pytest.param({"process": process("no-such-program")}, id="missing binary in PATH"),
        pytest.param({"process": process("true", user="no-such-user")}, id="no such user"),
        pytest.param({"process": process("true", user="\0")}, id="NUL in user"),
        pytest.param({"process": process("true", user="9" * 5000)}, id="endless user"),
        pytest.param({"process": process("true", group="no-such-group")}, id="no such group"),
        pytest.param({"process": process("true", user="4294967295")}, id="no id"),
        pytest.param(
            {"process": process("true", rlimits=[{"type": "no", "soft": 1, "hard": 1}])}, id="no such limit"
        ),
    ],
)
def test_newcontainer_refused(host: Host, change: dict[str, Any]) -> None:
    host.refused(Code.NEW_CONTAINER, CONTAINER | change)
    host.fence()
    # Nothing has changed: neither the pod nor id and seqs are used up.
    host.start("true")


def test_ids_are_taken_while_in_use(host: Host) -> None:
    host.start("cat")
    host.refused(Code.NEW_CONTAINER, {"id": "c", "process": process("true", stdio=3, stderr=4)})
    host.fence()


def test_processes_on_one_seq_are_mixed_and_the_oldest_has_stdin(host: Host) -> None:
    host.start("sh", "-c", "read x; echo first $x; read x; exit 3")
    host.exec("sh", "-c", "echo up; read x; echo second $x; read x; exit 4")
    host.read_until(1, b"up\n")
    host.start("cat", container="d", stdio=3, stderr=4)
    host.feed(1, b"A\n")
    host.read_until(1, b"first A\n")
    host.feed(1, b"\n")
    assert host.run_to_end() == ({}, 3)


def test_the_next_one_has_stdin_when_the_oldest_has_ended(host: Host) -> None:
    host.start("cat")
    host.exec("sh", "-c", "read x; exit 3", stdio=3, stderr=4)
    host.exec("sh", "-c", "echo up; read x; echo second $x; read x; exit 4", stdio=3, stderr=4)
    host.read_until(3, b"up\n")
    host.feed(3, b"\n")
    assert host.run_to_end(3) == ({}, 3)
    host.feed(3, b"B\n")
    host.read_until(3, b"second B\n")
    host.feed(3, b"\n")
    assert host.run_to_end(3) == ({}, 4)
    host.fence(3)


def test_execcmd(host: Host) -> None:
    host.start("cat")
    host.exec("sh", "-c", "cat; echo B >&2; exit 7", stdio=3, stderr=4)
    host.feed(3, b"A\n")
    host.feed(3)
    assert host.run_to_end(3) == ({3: b"A\n", 4: b"B\n"}, 7)
    host.feed(1, b"C")
    host.read_until(1, b"C")


def test_execcmd_in_an_unknown_container(host: Host) -> None:
    host.exec("true", container="x", stdio=3, stderr=4)
    wanted = bytes.fromhex("0000000000000003 0000000c0000000000000003 0000000d 7d")
    assert host.io.read(len(wanted)) == wanted
    host.fence()


@pytest.mark.parametrize(
    "changed", [process("/no/such", stdio=3, stderr=4), process("true", stdio=3, stderr=0), {}, None]
)
def test_execcmd_refused(host: Host, changed: object) -> None:
    host.start("cat")
    host.refused(Code.EXEC_CMD, {"container": "c", "process": changed})
    host.fence()


def test_a_missing_binary_can_be_a_panic(make_agent: MakeAgent) -> None:
    agent = make_agent(panic_on_missing_binary=True)
    with Host(agent.ctl, agent.io) as host:
        host.wait_ready()
        host.start_pod()
        host.start("cat")
        host.refused(Code.EXEC_CMD, {"container": "c", "process": process("/no/such", stdio=3, stderr=4)})
        host.send(Code.NEW_CONTAINER, {"id": "d", "process": process("/no/such", stdio=3, stderr=4)})
        host.ctl.rest()
        assert host.io.rest() == b""
    agent.join()
    assert agent.panic is not None


# What a process finds --------------------------------------------------------------------------------


def test_environment_and_directory(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_AGENT", "1")
    envs = [{"env": "A", "value": "x y"}, {"env": "HOME", "value": "/h"}, {"env": "A", "value": "é"}]
    host.start("sh", "-c", "pwd; env | sort | grep -v ^PWD=", envs=envs, workdir=str(tmp_path))
    output, status = host.run_to_end()
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert output[1].decode().splitlines() == [str(tmp_path), "A=é", "HOME=/h", f"PATH={path}"]
    assert status == 0


def test_programs_are_looked_for_in_the_path_of_the_process(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "my-program"
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    host.start("my-program", envs=[{"env": "PATH", "value": str(tmp_path)}])
    assert host.run_to_end() == ({1: b"here\n"}, 0)


def test_the_directory_is_the_root_by_default(host: Host) -> None:
    host.start("pwd")
    assert host.run_to_end() == ({1: b"/\n"}, 0)


def test_a_session_of_its_own_and_nothing_else_open(host: Host) -> None:
    reader, writer = os.pipe()
    try:
        os.set_inheritable(reader, True)
        os.set_inheritable(writer, True)
        script = "import os; print(os.listdir('/proc/self/fd'), os.getpid() == os.getsid(0) == os.getpgid(0))"
        host.start(sys.executable, "-ISc", script)
        # The fourth is the listing's own.
        assert host.run_to_end() == ({1: b"['0', '1', '2', '3'] True\n"}, 0)
    finally:
        os.close(reader)
        os.close(writer)


# killcontainer ---------------------------------------------------------------------------------------


def test_killcontainer(host: Host) -> None:
    host.start("sleep", "100")
    host.kill(signal.SIGKILL)
    assert host.run_to_end() == ({}, 0)


def wait_for_cat(host: Host) -> None:
    """A shell that is signalled while it starts a program may do so in either of the two processes."""
    host.feed(1, b"up\n")
    host.read_until(1, b"up\n")


def test_killcontainer_signals_the_first_process_alone(host: Host) -> None:
    host.start("sh", "-c", "trap 'echo T' TERM; cat; exit 3")
    wait_for_cat(host)
    host.kill(signal.SIGTERM)
    host.kill(signal.SIGTERM, allProcesses=False)
    host.feed(1, b"cat lives\n")
    host.read_until(1, b"cat lives\n")
    host.feed(1)
    assert host.run_to_end() == ({1: b"T\n"}, 3)


def test_killcontainer_all_processes(host: Host) -> None:
    host.start("sh", "-c", "trap 'exit 4' TERM; cat; exit 5")
    wait_for_cat(host)
    host.exec("sleep", "100", stdio=3, stderr=4)
    host.kill(signal.SIGTERM, allProcesses=True)
    ends: dict[int, bytes] = {}
    while len(ends) < 2:
        frame = host.read_frame()
        if not frame.payload:
            ends[frame.seq] = host.read_frame().payload
    assert ends == {1: b"\x04", 3: b"\0"}


def test_signal_0_is_only_asked_for(host: Host) -> None:
    host.start("cat")
    host.kill(0)
    host.feed(1)
    assert host.run_to_end() == ({}, 0)


@pytest.mark.parametrize(
    "change", [{"container": "x"}, {"signal": 65}, {"signal": -1}, {"signal": "9"}, {"color": "red"}]
)
def test_killcontainer_refused(host: Host, change: dict[str, Any]) -> None:
    host.start("cat")
    host.refused(Code.KILL_CONTAINER, {"container": "c", "signal": 9} | change)
    host.feed(1)
    assert host.run_to_end() == ({}, 0)


# winsize (the terminals are in test_terminal.py) and readfile ----------------------------------------


def test_winsize_of_an_unknown_seq(host: Host) -> None:
    host.ok(Code.WINSIZE, b'{"seq":5,"row":24,"column":80}')


@pytest.mark.parametrize(
    "body",
    [
        b'{"seq":1,"row":24,"column":80}',
        b'{"seq":5,"row":24}',
        b'{"seq":5,"row":24,"column":65536}',
        b'{"seq":5,"row":24,"column":80,"color":1}',
    ],
)
def test_winsize_refused(host: Host, body: bytes) -> None:
    host.start("cat")
    host.refused(Code.WINSIZE, body)


def test_readfile_of_a_long_file(host: Host, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    host.start("cat")
    for name in (str(tmp_path / "file"), str(tmp_path / "file").lstrip("/")):
        assert host.ok(Code.READ_FILE, {"container": "c", "file": name}) == content


def test_readfile_refused(host: Host, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    host.start("cat")
    for name in ("fifo", "missing", ".", "a\0b"):
        host.refused(Code.READ_FILE, {"container": "c", "file": str(tmp_path / name)})
    host.refused(Code.READ_FILE, {"container": "x", "file": "/etc/passwd"})
    host.refused(Code.READ_FILE, {"container": "c", "file": ""})
    host.refused(Code.READ_FILE, {"container": "c"})


# The end of a process --------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ["", "setsid"])
def test_the_end_waits_for_all_holders_of_the_output(host: Host, tmp_path: Path, escape: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    host.start("sh", "-c", f"{escape} sh -c 'read x <{fifo}; echo last' & echo $$; exit 7")
    pid = int(host.read_frame().payload)
    until(lambda: state_of(pid) in ("Z", ""))
    host.fence()
    host.refused(Code.START_POD, b"{}")
    fifo.write_text("\n")
    assert host.run_to_end() == ({1: b"last\n"}, 7)
    host.start_pod()


def test_holders_can_still_be_killed(host: Host) -> None:
    host.start("sh", "-c", "sleep 100 & echo $$; exit 7")
    pid = int(host.read_frame().payload)
    until(lambda: state_of(pid) in ("Z", ""))
    host.kill(signal.SIGKILL)
    host.fence()
    host.kill(signal.SIGKILL, allProcesses=True)
    assert host.run_to_end() == ({}, 7)


def test_output_that_was_closed_is_no_end(host: Host) -> None:
    host.start("sh", "-c", "echo A; exec >&- 2>&-; read x; exit 300")
    assert host.read_frame() == Frame(1, b"A\n")
    host.fence()
    host.feed(1)
    assert host.run_to_end() == ({}, 300 % 256)


def test_nobody_else_is_told_of_an_end(host: Host, agent: AgentThread) -> None:
    host.start("sh", "-c", "echo A; echo B >&2; exit 1")
    with Channel(agent.ctl):
        output, status = host.run_to_end()
        assert (output, status) == ({1: b"A\n", 2: b"B\n"}, 1)
        host.fence(2)


# Users -----------------------------------------------------------------------------------------------


def spec(**more: Any) -> commands.ProcessSpec:
    return commands.ProcessSpec(args=["true"], stdio=1, stderr=2, **more)


@needs_root
def test_whom_root_may_run_processes_as() -> None:
    assert credentials.resolve(spec()) is None
    user = pwd.getpwnam("daemon")
    own = credentials.resolve(spec(user="daemon"))
    assert own is not None
    assert (own.uid, own.gid) == (user.pw_uid, user.pw_gid)
    group = grp.getgrall()[-1]
    more = credentials.resolve(spec(user="54321", group=group.gr_name, additional_groups=["54322", "54322"]))
    assert more == credentials.Identity(54321, group.gr_gid, (group.gr_gid, 54322))


#: Prints which of its arguments, processes to be run by somebody without rights, are refused.
AS_NOBODY = """
import os, sys
import msgspec
from cc_proxy.agent.commands import ProcessSpec
from cc_proxy.agent.credentials import resolve
from cc_proxy.agent.errors import CommandRefused
os.setgroups([54_323])
os.setresgid(54_322, 54_322, 54_322)
os.setresuid(54_321, 54_321, 54_321)
for number, spec in enumerate(sys.argv[1:]):
    try:
        assert resolve(msgspec.json.decode(spec, type=ProcessSpec)) is None
    except CommandRefused:
        print(number)
"""


@needs_root
def test_who_is_not_root_runs_processes_as_himself() -> None:
    own = process("true", user="54321", group="54322", additionalGroups=["54322", "54323"])
    others = [
        process("true", user="54322"),
        process("true", group="54321"),
        process("true", additionalGroups=["54324"]),
    ]
    specs = map(json.dumps, [own, *others])
    command = [sys.executable, "-c", AS_NOBODY, *specs]
    refused = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert refused.stdout.split() == ["1", "2", "3"]
