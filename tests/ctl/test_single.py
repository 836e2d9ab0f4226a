"""Commands that are one request or two, and what is said when they fail."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cc_proxy.api import ProtocolError, TimedOut
from cc_proxy.cli.ctl import main
from cc_proxy.ctl.agentlog import log_name
from cc_proxy.ctl.errors import STATUS_MISUSE, explain
from tests.ctl.fake_proxy import ERROR, FakeProxy
from tests.ctl.running import CHECKOUT, ctl, interrupt, popen_piped
from tests.users import ALICE, call_as, needs_root
from tests.wire.support import WAIT

#: What to do about an answer that does not come in time.
GIVE_IT_TIME = "(--timeout gives it longer; `cc-proxyctl status` shows what it waits for)"


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr; nothing is on stdout."""
    captured = capfd.readouterr()
    assert captured.out == ""
    prefix, text, rest = re.split(r"^cc-proxyctl: |\n", captured.err, maxsplit=2)
    assert (prefix, rest) == ("", "")
    return text


def test_hello(proxy: FakeProxy) -> None:
    assert ctl(proxy, "hello", "ID", "--ctl", "/c", "--io", "/i") == 0
    assert proxy.wait_for("hello").arguments == {"containerId": "ID", "ctlSerial": "/c", "ioSerial": "/i"}


def test_hello_with_a_console_and_relative_paths(
    proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ctl(proxy, "hello", "ID", "--ctl", "c", "--io", "./i", "--console", "con") == 0
    assert proxy.wait_for("hello").arguments == {
        "containerId": "ID",
        "ctlSerial": f"{tmp_path}/c",
        "ioSerial": f"{tmp_path}/i",
        "console": f"{tmp_path}/con",
    }


@pytest.mark.parametrize("name", ["attach", "ping"])
def test_help_has_the_name_that_was_asked_for(capfd: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    assert capfd.readouterr().out.startswith(f"usage: cc-proxyctl {name} ")


@pytest.mark.parametrize(("member", "option"), [("ctlSerial", "--ctl"), ("ioSerial", "--io")])
def test_errors_name_the_option(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], member: str, option: str
) -> None:
    proxy.refused["hello"] = f"{member}: cannot connect to /c: No such file or directory"
    assert ctl(proxy, "hello", "ID", "--ctl", "/c", "--io", "/i") == 125
    assert error_line(capfd) == f"{option} ({member}): cannot connect to /c: No such file or directory"


@pytest.mark.parametrize("name", ["attach", "ping"])
def test_attach(proxy: FakeProxy, capfd: pytest.CaptureFixture[str], name: str) -> None:
    assert ctl(proxy, name, "ID") == 0
    assert proxy.names == ["attach", "ping"]
    assert re.fullmatch(r"ID: the VM answered in \d+\.\d ms\n", capfd.readouterr().out)


def test_bye(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(proxy, "bye", "ID") == 0
    assert proxy.names == ["bye"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text",
    ['{ "a" :1e2,\t"a":"\\u0041" }', " [] ", "1.0", '"äöü"', "null", '""'],
)
def test_hyper_sends_json_byte_for_byte(proxy: FakeProxy, text: str) -> None:
    assert ctl(proxy, "hyper", "ID", "testcmd", text) == 0
    assert proxy.names == ["attach", "testcmd"]
    assert proxy.wait_for("testcmd").data == text.strip().encode()


def test_hyper_without_data(proxy: FakeProxy) -> None:
    assert ctl(proxy, "hyper", "ID", "testcmd") == 0
    assert proxy.wait_for("testcmd").data == b""


def test_hyper_reads_stdin(proxy: FakeProxy) -> None:
    with popen_piped(proxy.path, "hyper", "ID", "testcmd", "-") as child:
        assert child.communicate(b'{"a": 1}\n', timeout=WAIT) == (b"", b"")
    assert child.returncode == 0
    assert proxy.wait_for("testcmd").data == b'{"a": 1}'


@pytest.mark.parametrize(
    ("refused", "argv"),
    [
        ("hello", ["hello", "ID", "--ctl", "/c", "--io", "/i"]),
        ("attach", ["attach", "ID"]),
        ("ping", ["attach", "ID"]),
        ("attach", ["hyper", "ID", "ping"]),
        ("ping", ["hyper", "ID", "ping"]),
        ("bye", ["bye", "ID"]),
        ("attach", ["exec", "ID", "true"]),
        ("allocateIO", ["exec", "ID", "true"]),
        ("execcmd", ["exec", "ID", "true"]),
    ],
)
def test_what_the_daemon_refuses(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], refused: str, argv: list[str]
) -> None:
    proxy.refused[refused] = "because of\nthat \x1b[1m"
    assert ctl(proxy, *argv) == 125
    assert error_line(capfd) == "because of that  [1m"


@pytest.mark.parametrize("argv", [["bye", "ID"], ["run", "--local", "true"], ["exec", "ID", "true"]])
def test_no_proxy(tmp_path: Path, capfd: pytest.CaptureFixture[str], argv: list[str]) -> None:
    path = str(tmp_path / "nothing")
    assert main(["--socket-path", path, *argv]) == 125
    assert error_line(capfd) == (
        f"cannot reach cc-proxy at {path}: No such file or directory "
        "(start cc-proxy, or name its socket with --socket-path or CC_PROXY_SOCKET)"
    )


@needs_root
def test_a_socket_that_is_for_others(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    Path(proxy.path).parent.chmod(0o755)
    assert call_as(ALICE, lambda: ctl(proxy, "bye", "ID")) == 125
    assert error_line(capfd) == (
        f"cannot reach cc-proxy at {proxy.path}: Permission denied "
        "(the socket is for its owner and group: become root, or a member of the group)"
    )


def test_a_server_that_is_not_the_proxy(tmp_sock_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_sock_dir / "http.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def serve() -> None:
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                sock.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        assert main(["--socket-path", path, "bye", "ID"]) == 125
        thread.join()
    assert error_line(capfd).startswith(
        f"{path} is not cc-proxy, or it failed: a message announces 1213486160"
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("unknown containerID: ID", "`cc-proxyctl status` lists"),
        ("message too long 11329", "10240 bytes at most: shorten"),
    ],
)
def test_texts_that_do_not_help_by_themselves(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], text: str, hint: str
) -> None:
    proxy.refused["testcmd"] = text
    assert ctl(proxy, "hyper", "ID", "testcmd") == 125
    line = error_line(capfd)
    assert line.startswith(f"{text} (")
    assert hint in line


def test_a_socket_path_that_is_too_long(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket-path", "/" + "x" * 200, "bye", "ID"]) == 125
    assert error_line(capfd).endswith("x: AF_UNIX path too long (a socket's path has at most 107 bytes)")


def test_a_proxy_that_hangs_up(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.hangs_up_on.add("bye")
    assert ctl(proxy, "bye", "ID") == 125
    assert error_line(capfd) == "the proxy closed the connection instead of answering bye"


def test_a_proxy_that_does_not_answer(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    held = proxy.hold("ping")
    assert ctl(proxy, "attach", "ID", "--timeout", "0.05") == 125
    assert error_line(capfd) == (f"{proxy.path} has not answered hyper in time {GIVE_IT_TIME}")
    held.set()


def test_the_agents_own_error(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.refused["testcmd"] = ERROR
    assert ctl(proxy, "hyper", "ID", "testcmd") == 125
    assert error_line(capfd) == f"{ERROR} (the agent does not say why; the VM's console may)"


def test_an_embedded_agent_says_why_it_refuses(
    proxy: FakeProxy,
    tmp_sock_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_sock_dir))
    log = tmp_sock_dir / "cc-proxyctl-x" / log_name("ID")
    log.parent.mkdir()
    log.write_text("cc-proxy agent: testcmd: an earlier reason\n")

    def complain() -> None:
        with log.open("a") as file:
            file.write("cc-proxy agent: testcmd: no such thing\n")

    proxy.when_asked["testcmd"] = complain
    proxy.refused["testcmd"] = ERROR
    assert ctl(proxy, "hyper", "ID", "testcmd") == 125
    assert error_line(capfd) == f"{ERROR} (cc-proxy agent: testcmd: no such thing)"


@pytest.mark.parametrize(
    ("name", "text", "step"),
    [
        ("bye", "unknown containerID: ID", "`cc-proxyctl status` lists the VMs that you may use"),
        (
            "hello",
            "ID: container already registered",
            "choose another id, or free this one: `cc-proxyctl bye ID`",
        ),
        ("ping", "message too long 10241", "a command for the agent has 10240 bytes at most: shorten its"),
        ("ping", "unknown command 'x'", "`cc-proxyctl hyper --help` lists the commands"),
        ("ping", "VM gone: the VM hung up its I/O channel", "`cc-proxyctl bye ID` frees the id"),
    ],
)
def test_what_to_do_about_a_refusal(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], name: str, text: str, step: str
) -> None:
    hello = ["hello", "ID", "--ctl", "/ctl", "--io", "/io"]
    argv = {"bye": ["bye", "ID"], "hello": hello}.get(name, ["hyper", "ID", "ping"])
    proxy.refused[name] = text
    assert ctl(proxy, *argv) == 125
    assert error_line(capfd).startswith(f"{text} ({step}")


def test_what_is_not_utf_8(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "ODD", os.fsdecode(b"\xff"))
    assert ctl(proxy, "exec", "-e", "ODD", "pod", "true") == 2
    assert error_line(capfd) == "not valid UTF-8: '\\udcff'"


def test_ctrl_c(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.hold("bye")
    proxy.when_asked["bye"] = interrupt(signal.SIGINT)
    assert ctl(proxy, "bye", "ID") == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ProtocolError("odd"), "odd"),
        (
            TimedOut("timed out connecting to /x"),
            f"timed out connecting to /x {GIVE_IT_TIME}",
        ),
        (BrokenPipeError(32, "Broken pipe"), "the connection to cc-proxy was lost: Broken pipe"),
        (ConnectionResetError(104, "reset"), "the connection to cc-proxy was lost: reset"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (OSError(28, "No space left on device", "/tmp/x"), "/tmp/x: No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_explanations(error: Exception, text: str) -> None:
    assert explain(error) == text


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"], ids=["closed", "full"])
@pytest.mark.parametrize(
    ("program", "arguments", "status"),
    [
        ("cc_proxy.cli.ctl", ["--socket-path", "/nonexistent", "bye", "ID"], 125),
        ("cc_proxy.cli.ctl", ["nonsense"], 2),
        ("cc_proxy", ["--config", "/nonexistent"], 78),
        ("cc_proxy", ["--nonsense"], 2),
    ],
)
def test_nobody_listens(program: str, arguments: list[str], status: int, stderr: str) -> None:
    """What it has to say of its failure goes nowhere, and changes nothing."""
    shell = ["sh", "-c", f'exec "$@" {stderr}', "sh", sys.executable, "-m", program, *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        shell, cwd=CHECKOUT, env=buffered, stdout=subprocess.PIPE, timeout=WAIT, check=False
    )
    assert ended.returncode == status
    assert not ended.stdout or status == STATUS_MISUSE, "argparse prints its usage there if stderr is closed"
