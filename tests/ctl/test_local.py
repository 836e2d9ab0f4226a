"""With the daemon and the embedded agent as they are."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.cli.ctl import main
from tests.ctl.fake_proxy import FakeProxy
from tests.ctl.running import CHECKOUT, ctl, popen_piped, read_until
from tests.ctl.test_single import error_line
from tests.ctl.window import Window
from tests.wire.daemon import Daemon

LOCAL = ("run", "--local", "--")


def reads_on(kind: str) -> tuple[str, ...]:
    return "run", kind, "--id", "pod", "-i", "--"


GUEST = [pytest.mark.guest, pytest.mark.timeout(300)]


@pytest.fixture(params=["--local", pytest.param("--vm", marks=GUEST)])
def kind(request: pytest.FixtureRequest) -> str:
    """What `run` is to start: an agent, or a VM with an agent in it."""
    chosen: str = request.param
    if chosen == "--vm":
        request.getfixturevalue("use_guest")
    return chosen


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with (
        tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as path,
        Daemon.configured(Path(path)) as daemon,
    ):
        yield daemon
        daemon.check()


@pytest.fixture
def socket_path(daemon: Daemon) -> str:
    return str(daemon.socket_path)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_sock_dir: Path) -> Iterator[None]:
    """Whatever happens, nothing is left of the private directory."""
    directory = tmp_sock_dir / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield
    assert list(directory.iterdir()) == []


def outcome(
    socket_path: str, *argv: str, stdin: bytes = b"", **options: Any
) -> tuple[bytes | None, bytes, int]:
    """Return what a command prints, what it says on stderr, and its exit status."""
    with popen_piped(socket_path, *argv, **options) as child:
        output, errors = child.communicate(stdin)
    return output, errors, child.returncode


def test_run(socket_path: str, kind: str) -> None:
    shell = "echo out; echo err >&2; exit 9"
    assert outcome(socket_path, "run", kind, "--", "sh", "-c", shell) == (b"out\n", b"err\n", 9)


def test_run_in_this_process(socket_path: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket-path", socket_path, "run", kind, "--", "sh", "-c", "echo hello; exit 4"]) == 4
    assert capfd.readouterr() == ("hello\n", "")


def test_what_the_process_is_given(socket_path: str, kind: str) -> None:
    process = ["run", kind, "-e", "A=b c", "-w", "/usr", "--", "sh", "-c", 'echo "$A"; pwd; cat']
    assert outcome(socket_path, *process, stdin=b"not for it") == (b"b c\n/usr\n", b"", 0)


def test_10_mib_out(socket_path: str, kind: str) -> None:
    output, errors, status = outcome(socket_path, "run", kind, "--", "head", "-c", "10485760", "/dev/zero")
    assert output == bytes(10485760)
    assert (errors, status) == (b"", 0)


def test_there_and_back(socket_path: str, kind: str) -> None:
    data = os.urandom(60_000)  # an agent may lose what a pipe cannot hold and the process does not read yet
    assert outcome(socket_path, *reads_on(kind), "cat", stdin=data) == (data, b"", 0)


def test_what_is_not_there_cannot_be_started(socket_path: str, kind: str) -> None:
    output, errors, status = outcome(socket_path, "run", kind, "--", "no/such/thing")
    assert (output, status) == (b"", 127)
    assert errors == (
        b"cc-proxyctl: cannot start 'no/such/thing': ERROR received from Hyperstart "
        b"(cc-proxy agent: newcontainer: no program 'no/such/thing')\n"
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-w", "/no/such"], "no directory '/no/such'"),
        (["-u", "nobody-at-all"], "no user 'nobody-at-all'"),
        (["-u", ":nobody-at-all"], "no group 'nobody-at-all'"),
    ],
)
def test_the_agent_says_why_it_starts_nothing(
    socket_path: str, capfd: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    assert main(["--socket-path", socket_path, "run", "--local", *options, "--", "true"]) == 127
    refusal = "cannot start 'true': ERROR received from Hyperstart"
    assert error_line(capfd) == f"{refusal} (cc-proxy agent: newcontainer: {why})"


def test_an_agent_says_it_to_exec_too(socket_path: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with popen_piped(socket_path, *reads_on(kind), "sh", "-c", "echo ready; cat") as pod:
        assert pod.stdin is not None
        assert pod.stdout is not None
        assert pod.stdout.readline() == b"ready\n"
        for command, why in {
            "pod -- no/such": "no program 'no/such'",
            "pod -- /etc/passwd": "'/etc/passwd': Permission denied",
            "-w /no/such pod -- true": "no directory '/no/such'",
            "-u nobody-at-all pod -- true": "no user 'nobody-at-all'",
            "-u :nobody-at-all pod -- true": "no group 'nobody-at-all'",
        }.items():
            words = command.split()
            assert main(["--socket-path", socket_path, "exec", *words]) == 127
            refusal = f"cannot start '{words[-1]}': ERROR received from Hyperstart"
            assert error_line(capfd) == f"{refusal} (cc-proxy agent: execcmd: {why})"
        pod.stdin.close()
        assert pod.wait() == 0


def test_no_stdin_is_lost_while_a_process_does_not_read(socket_path: str, kind: str) -> None:
    data = os.urandom(300_000)
    output, errors, status = outcome(socket_path, *reads_on(kind), "sh", "-c", "sleep 1; cat", stdin=data)
    assert (output == data, errors, status) == (True, b"", 0)


def test_head(socket_path: str, kind: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert outcome(socket_path, "run", kind, "--", "yes", stdout=writer) == (None, b"", 141)
    finally:
        os.close(writer)


def test_a_signal_reaches_the_process(socket_path: str, kind: str) -> None:
    shell = 'trap "echo got it; exit 3" TERM; echo ready; while :; do sleep 0.02; done'
    with popen_piped(socket_path, "run", kind, "--", "sh", "-c", shell) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.terminate()
        assert child.communicate() == (b"got it\n", b"")
        assert child.returncode == 3


@pytest.mark.parametrize(
    ("kind", "signum"),
    [
        ("--local", signal.SIGINT),
        ("--local", signal.SIGTERM),
        ("--local", signal.SIGHUP),
        pytest.param("--vm", signal.SIGTERM, marks=GUEST),
    ],
    indirect=["kind"],
)
def test_a_signal_that_kills_the_process(socket_path: str, kind: str, signum: signal.Signals) -> None:
    with popen_piped(socket_path, "run", kind, "--", "sh", "-c", "echo ready; exec sleep 1000") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signum)
        assert child.wait() == 128 + signum


@pytest.mark.parametrize(("hangs_up", "status"), [(False, 128 + signal.SIGTERM), (True, 128 + signal.SIGHUP)])
def test_a_shell_in_a_terminal_ends_with_its_client(
    socket_path: str, kind: str, window: Window, hangs_up: bool, status: int
) -> None:
    with popen_piped(socket_path, *reads_on(kind), "sh", "-c", "echo $$; cat") as pod:
        assert pod.stdin is not None
        assert pod.stdout is not None
        pod.stdout.readline()
        with window.start(socket_path, "exec", "-ti", "pod", "sh", "-c", "echo $$; exec sh") as child:
            shell = int(read_until(window.user, b"\r\n"))
            read_until(window.user, b"# " if os.geteuid() == 0 else b"$ ")
            if hangs_up:
                window.hang_up()
            else:
                child.terminate()
            assert child.wait() == status
            waits = f"while kill -0 {shell} 2> /dev/null; do sleep 0.05; done"
            assert outcome(socket_path, "exec", "pod", "--", "sh", "-c", waits) == (b"", b"", 0)
        pod.stdin.close()


def test_exec(socket_path: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with popen_piped(socket_path, *reads_on(kind), "cat") as pod:
        assert pod.stdin is not None
        assert pod.stdout is not None
        pod.stdin.write(b"ready\n")
        pod.stdin.flush()
        assert pod.stdout.readline() == b"ready\n"
        shell = ("sh", "-c", "cat; echo err >&2; exit 5")
        assert outcome(socket_path, "exec", "-i", "pod", *shell, stdin=b"in") == (b"in", b"err\n", 5)
        assert outcome(socket_path, "exec", "pod", "no/such")[2] == 127
        assert main(["--socket-path", socket_path, "ping", "pod"]) == 0
        assert re.fullmatch(r"pod: the VM answered in .* ms\n", capfd.readouterr().out)
        assert main(["--socket-path", socket_path, *reads_on(kind), "cat"]) == 125
        taken = {
            "--local": "pod: container already registered (choose another id, ",
            "--vm": "pod: a VM with this id runs already (`cc-proxyctl vm stop pod` ends it)",
        }
        assert error_line(capfd).startswith(taken[kind])
        kill = '{"container": "pod", "signal": 1}'
        assert main(["--socket-path", socket_path, "hyper", "pod", "killcontainer", kill]) == 0
        assert pod.wait() == 0  # hyperstart's status of what a signal has ended
    assert main(["--socket-path", socket_path, "ping", "pod"]) == 125
    assert error_line(capfd).startswith("unknown containerID: pod (")


def test_a_terminal(socket_path: str, kind: str, window: Window) -> None:
    before = window.mode()
    shell = (
        'stty size; test -t 0 -a -t 1 -a -t 2 && echo "$TERM"; stty -echo; echo ready; read -r line; exit 6'
    )
    with window.start(socket_path, "run", kind, "-ti", "--", "sh", "-c", shell) as child:
        *progress, said = read_until(window.user, b"ready\r\n").split(b"\r\x1b[K")
        assert said == b"24 80\r\nxterm\r\nready\r\n"
        assert bool(progress) == (kind == "--vm")
        os.write(window.user, b"typed\r")
        assert child.wait() == 6
    assert window.mode() == before


def test_a_terminal_that_hangs_up(socket_path: str, kind: str, window: Window) -> None:
    shell = 'trap "" TERM HUP; echo ready; while :; do sleep 1; done'
    with window.start(socket_path, "run", kind, "-ti", "--", "sh", "-c", shell) as child:
        read_until(window.user, b"ready\r\n")
        window.hang_up()
        assert child.wait() == 129


def test_the_agent_goes_away(socket_path: str, kind: str) -> None:
    with popen_piped(socket_path, *reads_on(kind), "sh", "-c", "echo ready; cat") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        os.kill(agent_of(child.pid), signal.SIGKILL)
        assert child.wait() == 125
        assert child.stderr is not None
        # What it has sent may still be delivered to others, and it is no VM that has failed until then.
        which = rb"cc-proxyctl: the VM (was lost|has gone) before 'sh' had ended"
        assert re.match(which + rb"(:|; its last error:) the VM hung up", child.stderr.read())


def test_the_agent_does_not_outlive_a_command_that_is_killed(socket_path: str, kind: str) -> None:
    """And clears up after both: nothing stays."""
    with popen_piped(socket_path, *reads_on(kind), "sh", "-c", "echo ready; cat") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        agent = os.pidfd_open(agent_of(child.pid))
        child.kill()
        poll = select.poll()
        poll.register(agent, select.POLLIN)
        assert poll.poll(20_000)
        os.close(agent)


def test_an_agent_whose_command_is_killed_before_it_listens(tmp_sock_dir: Path) -> None:
    ours, theirs = socket.socketpair()
    directory = tmp_sock_dir / "tmp" / "private"
    directory.mkdir()
    (directory / "agent.log").touch()
    command = ["agent", "--ctl", f"{directory}/ctl", "--io", f"{directory}/io", "--remove", str(directory)]
    argv = [sys.executable, "-m", "cc_proxy.cli.ctl", *command, "--ready-fd", str(theirs.fileno())]
    ours.close()
    with (
        theirs,
        subprocess.Popen(argv, pass_fds=[theirs.fileno()], cwd=CHECKOUT, stderr=subprocess.DEVNULL) as agent,
    ):
        assert agent.wait() == 125


def agent_of(pid: int) -> int:
    """Return the process that a command has started as its agent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                return int(stat.parent.name)
    raise AssertionError(f"{pid} has no children")


def test_sockets_of_an_agent_that_runs_already(socket_path: str, tmp_sock_dir: Path) -> None:
    paths = [str(tmp_sock_dir / "ctl"), str(tmp_sock_dir / "io")]
    with running_agent(*paths) as agent:
        argv = ["run", "--ctl", paths[0], "--io", paths[1], "--", "sh", "-c", "echo hello; exit 2"]
        assert outcome(socket_path, *argv) == (b"hello\n", b"", 2)
        assert agent.wait() == 0  # it was powered off


@contextlib.contextmanager
def running_agent(ctl_path: str, io_path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `agent`, once it has said that it is ready."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "cc_proxy.cli.ctl", "agent", "--ctl", ctl_path, "--io", io_path]
    with subprocess.Popen([*command, "--ready-fd", str(writer)], pass_fds=[writer], cwd=CHECKOUT) as agent:
        os.close(writer)
        try:
            assert os.read(reader, 1) == b"\n"
            yield agent
        finally:
            os.close(reader)
            agent.terminate()


def test_an_agent_in_the_foreground_says_when_it_listens(tmp_sock_dir: Path) -> None:
    paths = [str(tmp_sock_dir / name) for name in ("ctl", "io")]
    command = [sys.executable, "-m", "cc_proxy.cli.ctl", "agent", "--ctl", paths[0], "--io", paths[1]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=CHECKOUT) as agent:
        assert agent.stderr
        assert agent.stderr.readline().decode() == f"cc-proxy agent: listens on {paths[0]} and {paths[1]}\n"
        for path in paths:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
        agent.terminate()
        assert agent.stderr.read() == b""
        assert agent.wait() == 0


def test_an_agent_that_cannot_listen(tmp_sock_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    occupied = tmp_sock_dir / "ctl"
    occupied.touch()
    command = ["agent", "--ctl", str(occupied), "--io", str(tmp_sock_dir / "io")]
    child = subprocess.run([sys.executable, "-m", "cc_proxy.cli.ctl", *command], cwd=CHECKOUT, check=False)
    assert child.returncode == 1
    assert f"{occupied}: there is something that is not a socket" in capfd.readouterr().err


# Agents that do not come up, with something else in Python's place ---


@pytest.fixture
def in_pythons_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script that is run as the agent."""
    path = tmp_path / "python"
    path.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_an_agent_that_fails(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], in_pythons_place: Path
) -> None:
    in_pythons_place.write_text("#!/bin/sh\necho some words >&2\necho the last words >&2\nexit 1\n")
    assert ctl(proxy, *LOCAL, "x") == 125
    assert error_line(capfd) == "the embedded agent did not start: the last words"
    assert proxy.names == []


def test_an_agent_that_fails_without_a_word(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], in_pythons_place: Path
) -> None:
    in_pythons_place.write_text("#!/bin/sh\n")
    assert ctl(proxy, *LOCAL, "x") == 125
    assert error_line(capfd) == "the embedded agent did not start: it did not say why"


def test_an_agent_that_never_listens(
    proxy: FakeProxy,
    capfd: pytest.CaptureFixture[str],
    in_pythons_place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cc_proxy.ctl.local._PATIENCE", 0.1)
    in_pythons_place.write_text("#!/bin/sh\ntrap '' TERM\nexec sleep 60\n")
    assert ctl(proxy, *LOCAL, "x") == 125
    assert error_line(capfd).startswith("the embedded agent does not listen after")


def test_a_signal_while_the_agent_comes_up(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], in_pythons_place: Path
) -> None:
    in_pythons_place.write_text("#!/bin/sh\nkill -INT $PPID\nexec sleep 60\n")
    assert ctl(proxy, *LOCAL, "x") == 130
    assert capfd.readouterr() == ("", "")


def test_an_agent_that_cannot_be_run(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], in_pythons_place: Path
) -> None:
    in_pythons_place.unlink()
    assert ctl(proxy, *LOCAL, "x") == 125
    assert error_line(capfd) == f"{in_pythons_place}: No such file or directory"


def test_the_ready_fd_of_an_agent_is_its_life_line(tmp_sock_dir: Path) -> None:
    ours, theirs = socket.socketpair()
    command = ["agent", "--ctl", str(tmp_sock_dir / "ctl"), "--io", str(tmp_sock_dir / "io")]
    argv = [sys.executable, "-m", "cc_proxy.cli.ctl", *command, "--ready-fd", str(theirs.fileno())]
    with subprocess.Popen(argv, pass_fds=[theirs.fileno()], cwd=CHECKOUT) as agent:
        theirs.close()
        assert ours.recv(1) == b"\n"
        with pytest.raises(subprocess.TimeoutExpired):
            agent.wait(0.1)
        ours.close()
        assert agent.wait() == 0
    assert [path.name for path in tmp_sock_dir.iterdir()] == ["tmp"]
