"""`run` and `exec` from end to end: what is asked of the proxy, and that nothing is left in any outcome."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cc_proxy.api import EndedVm, LastError, VmStatus
from cc_proxy.ctl.signals import ENDING
from tests.ctl.fake_proxy import ERROR, FakeProcess, FakeProxy, exits
from tests.ctl.running import RUN, VM, ctl, interrupt, popen_piped
from tests.ctl.test_single import GIVE_IT_TIME, error_line
from tests.ctl.test_status import STATUS
from tests.ctl.test_status import VM as SOME_VM
from tests.wire.support import WAIT, wait_until

SETUP = ["hello", "startpod", "allocateIO", "newcontainer"]
DESTROYED = ["attach", "destroypod", "bye"]
KILLED = ["attach", "killcontainer", "destroypod", "bye"]


def says_hello(process: FakeProcess) -> None:
    process.out(b"hello\n")
    process.err(b"oh\n")
    process.exit(3)


def test_run(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.script = says_hello
    assert ctl(proxy, *RUN, "--", "greet", "me") == 3
    assert capfd.readouterr() == ("hello\n", "oh\n")
    assert proxy.names == SETUP + DESTROYED
    assert proxy.wait_for("hello").arguments == {
        "containerId": "pod",
        "ctlSerial": "/vm/ctl",
        "ioSerial": "/vm/io",
    }
    assert proxy.wait_for("startpod").arguments["hostname"] == "pod"
    assert proxy.wait_for("allocateIO").arguments == {"nStreams": 2}
    container = proxy.wait_for("newcontainer").arguments
    assert (container["id"], container["image"]) == ("pod", "pod")
    assert container["process"]["args"] == ["greet", "me"]
    assert (container["process"]["stdio"], container["process"]["stderr"]) == (1, 2)
    assert proxy.wait_for("bye").arguments == {"containerId": "pod"}


def test_exec(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.script = says_hello
    proxy.io_base = 2**40
    assert ctl(proxy, "exec", "pod", "--", "greet", "me") == 3
    assert capfd.readouterr() == ("hello\n", "oh\n")
    assert proxy.names == ["attach", "allocateIO", "execcmd"]
    command = proxy.wait_for("execcmd").arguments
    assert command["container"] == "pod"
    assert command["process"]["args"] == ["greet", "me"]
    assert command["process"]["stdio"] == 2**40


@pytest.mark.parametrize("status", [0, 1, 125, 127, 255])
def test_the_exit_status_is_the_processs(proxy: FakeProxy, status: int) -> None:
    proxy.script = exits(status)
    assert ctl(proxy, *RUN, "x") == status


def test_stdin_ends_at_once(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.exit(0 if process.receive() == (1, b"") else 1)

    proxy.script = script
    assert ctl(proxy, *RUN, "x") == 0


def test_output_that_comes_before_the_command_is_acknowledged(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.process_first = True
    proxy.script = says_hello
    assert ctl(proxy, *RUN, "x") == 3
    assert capfd.readouterr() == ("hello\n", "oh\n")


def test_the_end_in_any_pieces(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    def script(process: FakeProcess) -> None:
        everything = b"".join(
            bytes([0, 0, 0, 0, 0, 0, 0, seq, 0, 0, 0, 12 + len(payload)]) + payload
            for seq, payload in [(1, b"out"), (2, b"err"), (2, b""), (1, b""), (1, b"\x09"), (1, b"")]
        )
        for byte in everything:
            process.send(bytes([byte]))

    proxy.script = script
    assert ctl(proxy, *RUN, "x") == 9
    assert capfd.readouterr() == ("out", "err")


# What goes wrong ---


@pytest.mark.parametrize(
    ("refused", "names"),
    [
        ("hello", ["hello"]),
        ("startpod", ["hello", "startpod", *DESTROYED]),
        ("allocateIO", ["hello", "startpod", "allocateIO", *DESTROYED]),
        ("newcontainer", [*SETUP, *KILLED]),
    ],
)
def test_what_the_daemon_refuses(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], refused: str, names: list[str]
) -> None:
    proxy.refused[refused] = "that is why"
    assert ctl(proxy, *RUN, "x") == 125
    assert error_line(capfd) == "that is why"
    assert proxy.names == names


def test_an_id_that_is_taken_stays_its_owners(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.refused["hello"] = "pod: container already registered"
    assert ctl(proxy, *RUN, "x") == 125
    assert error_line(capfd).startswith("pod: container already registered (choose another id, ")
    assert "bye" not in proxy.names


def test_a_pod_that_was_there_before_stays(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.refused["startpod"] = ERROR
    assert ctl(proxy, *RUN, "x") == 125
    hint = "the VM may have a pod already: it takes one at a time"
    assert error_line(capfd) == f"cannot start a pod: {ERROR} ({hint})"
    assert proxy.names == ["hello", "startpod", "bye"]


@pytest.mark.parametrize(
    ("refused", "argv", "names"),
    [
        ("newcontainer", [*RUN, "--", "no/such", "thing"], [*SETUP, *KILLED]),
        ("execcmd", ["exec", "pod", "no/such"], ["attach", "allocateIO", "execcmd"]),
    ],
)
def test_what_the_agent_cannot_start(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], refused: str, argv: list[str], names: list[str]
) -> None:
    proxy.refused[refused] = ERROR
    assert ctl(proxy, *argv) == 127
    assert error_line(capfd) == (
        f"cannot start 'no/such': {ERROR} (the agent does not say why: look whether the program, "
        "-w's directory and -u's user are there)"
    )
    assert proxy.names == names


def test_an_agent_that_says_why(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.refused["execcmd"] = f"{ERROR}: out of memory"
    assert ctl(proxy, "exec", "pod", "x") == 127
    assert error_line(capfd) == f"cannot start 'x': {ERROR}: out of memory"


@pytest.mark.parametrize("argv", [RUN, ("exec", "pod")], ids=["run", "exec"])
def test_a_vm_that_goes_away(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"so far\n")
        process.io.shutdown(socket.SHUT_RDWR)

    proxy.script = script
    proxy.refused |= dict.fromkeys(["killcontainer", "destroypod", "bye"], "unknown containerID: pod")
    proxy.refused["status"] = "no payload named 'status'"
    assert ctl(proxy, *argv, "--", "cmd", "x") == 125
    captured = capfd.readouterr()
    assert captured.out == "so far\n"
    assert captured.err == (
        "cc-proxyctl: the VM or cc-proxy went away before 'cmd' had ended; cc-proxy does not say which: "
        "no payload named 'status' (its log may say it)\n"
    )


def vm(name: str, **changes: Any) -> VmStatus:
    return msgspec.structs.replace(SOME_VM, id=name, **changes)


NOW = LastError(text="the VM hung up", age=0.0)
LONG_AGO = LastError(text="an earlier one", age=1000.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ended": [EndedVm(id="pod", error=NOW)]}, "the VM was lost before 'x' had ended: the VM hung up"),
        (
            {"vms": [vm("pod", state="gone", last_error=NOW)]},
            "the VM has gone before 'x' had ended; its last error: the VM hung up",
        ),
        (
            {
                "ended": [EndedVm(id="other", error=NOW), EndedVm(id="pod", error=LONG_AGO)],
                "vms": [vm("other", state="lost", last_error=NOW), vm("pod", last_error=NOW)],
            },
            "cc-proxy closed the streams before 'x' had ended (cc-proxy's log says why)",
        ),
        ({"vms": [vm("pod", state="gone", last_error=None)]}, "the VM powered off before 'x' had ended"),
        ({"vms": [vm("pod", state="lost", last_error=None)]}, "the VM powered off before 'x' had ended"),
        ({"vms": [vm("pod", age=0.0)]}, "somebody said bye for the VM before 'x' had ended"),
        ({"uptime": 0.0}, "cc-proxy was restarted before 'x' had ended (its log says why)"),
        (
            {"uptime": 0.0, "known_for": 1000.0, "vms": [vm("pod", state="gone", last_error=NOW)]},
            "the VM has gone before 'x' had ended; its last error: the VM hung up",
        ),
    ],
    ids=["lost", "gone", "neither", "powered off", "powers off", "bye and hello", "restarted", "replaced"],
)
def test_why_the_streams_ended(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    proxy.script = lambda process: process.io.shutdown(socket.SHUT_RDWR)
    proxy.results["status"] = msgspec.structs.replace(STATUS, **changes)
    assert ctl(proxy, "exec", "pod", "x") == 125
    assert error_line(capfd) == said


def test_streams_that_ended_after_bye(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    """Also while what the VM has sent is still delivered to others."""

    def script(process: FakeProcess) -> None:
        proxy.refused["attach"] = "unknown containerID: pod"
        process.io.shutdown(socket.SHUT_RDWR)

    proxy.script = script
    proxy.results["status"] = msgspec.structs.replace(STATUS, vms=[vm("pod", state="lost", last_error=None)])
    assert ctl(proxy, "exec", "pod", "x") == 125
    assert error_line(capfd) == "somebody said bye for the VM before 'x' had ended"


def test_what_is_no_frame(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.script = lambda process: process.send(bytes(12))
    assert ctl(proxy, *RUN, "x") == 125
    assert error_line(capfd) == "a frame on stream 0 with a total length of 0"
    assert proxy.names == SETUP + KILLED


@pytest.mark.parametrize("name", ["startpod", "allocateIO", "newcontainer"])
def test_a_proxy_that_hangs_up(proxy: FakeProxy, capfd: pytest.CaptureFixture[str], name: str) -> None:
    proxy.hangs_up_on.add(name)
    assert ctl(proxy, *RUN, "x") == 125
    assert "the proxy closed the connection instead of answering" in error_line(capfd)
    assert proxy.names[-2:] == ["destroypod", "bye"]


@pytest.mark.parametrize("name", ["startpod", "allocateIO", "newcontainer"])
def test_a_vm_that_does_not_answer(proxy: FakeProxy, capfd: pytest.CaptureFixture[str], name: str) -> None:
    proxy.hold(name)
    assert ctl(proxy, *RUN, "--timeout", "0.05", "x") == 125
    payload = name if name == "allocateIO" else "hyper"
    assert error_line(capfd) == (f"{proxy.path} has not answered {payload} in time {GIVE_IT_TIME}")
    assert proxy.names[-2:] == ["destroypod", "bye"]


def test_a_hello_that_is_not_answered(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    """The VM may be registered later on: nobody can say yet, but the user should know."""
    proxy.hold("hello")
    proxy.refused["bye"] = "unknown containerID: pod"
    assert ctl(proxy, *RUN, "--timeout", "0.05", "x") == 125
    assert proxy.names == ["hello", "bye"]
    assert capfd.readouterr().err.splitlines() == [
        "cc-proxyctl: pod may still become registered: the answer to its hello was not waited for",
        f"cc-proxyctl: {proxy.path} has not answered hello in time {GIVE_IT_TIME}",
    ]


def test_a_proxy_that_ends(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    def script(process: FakeProcess) -> None:
        process.stdin()  # so newcontainer was answered
        process.proxy.hang_up()

    proxy.script = script
    assert ctl(proxy, *RUN, "cmd") == 125
    assert error_line(capfd) == "cc-proxy went away before 'cmd' had ended (its log says why)"


def test_a_pod_that_cannot_be_destroyed_is_unregistered_all_the_same(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cc_proxy.ctl.pod._GRACE", 0.05)
    proxy.hold("destroypod")
    assert ctl(proxy, *RUN, "x") == 0
    assert proxy.names == SETUP + DESTROYED
    assert capfd.readouterr() == ("", "")


def test_a_vm_that_cannot_be_unregistered_is_named(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.hangs_up_on.add("bye")
    proxy.script = exits(4)
    assert ctl(proxy, *RUN, "x") == 4
    assert error_line(capfd).startswith("pod may still be registered: the proxy closed the connection")


def test_no_terminal(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (["run", "-t", *VM, "sh"], ["exec", "-ti", "pod", "sh"]):
        assert ctl(proxy, *argv) == 2
        assert error_line(capfd) == "the input device is not a TTY, which -t needs"
    assert proxy.names == []


# Signals before the process runs ---


@pytest.mark.parametrize("argv", [RUN, ("exec", "pod")], ids=["run", "exec"])
def test_a_signal_while_cc_proxy_takes_no_connections(tmp_sock_dir: Path, argv: tuple[str, ...]) -> None:
    path = str(tmp_sock_dir / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)  # nobody else fits into its backlog
        with popen_piped(path, *argv, "x") as child:
            wait_until(lambda: catches(child.pid, signal.SIGTERM), "it looks for signals")
            child.terminate()
            assert child.wait(WAIT) == 143


def catches(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    fields = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["SigCgt"], 16) >> (signum - 1) & 1)


@pytest.mark.parametrize("signum", ENDING, ids=lambda signum: signum.name)
def test_a_signal_during_setup(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    proxy.hold("startpod")
    proxy.when_asked["startpod"] = interrupt(signum)
    assert ctl(proxy, *RUN, "x") == 128 + signum
    assert proxy.names == ["hello", "startpod", *DESTROYED]
    assert capfd.readouterr() == ("", "")


def test_a_signal_during_hello_waits_for_its_answer(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.when_asked["hello"] = interrupt(signal.SIGINT)
    assert ctl(proxy, *RUN, "x") == 130
    assert proxy.names == ["hello", "bye"]
    assert capfd.readouterr() == ("", "")


def test_a_signal_during_a_hello_that_is_refused(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.when_asked["hello"] = interrupt(signal.SIGINT)
    proxy.refused["hello"] = "taken"
    assert ctl(proxy, *RUN, "x") == 125
    assert error_line(capfd) == "taken"
    assert proxy.names == ["hello"]


def test_a_second_signal_during_hello_does_not_wait(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.hold("hello")

    def interrupt_twice() -> None:
        # One after the other, or the system makes one of them.
        interrupt(signal.SIGINT)()
        interrupt(signal.SIGTERM)()

    proxy.when_asked["hello"] = interrupt_twice
    proxy.refused["bye"] = "unknown containerID: pod"
    assert ctl(proxy, *RUN, "x") in (130, 143)
    assert proxy.names == ["hello", "bye"]
    assert error_line(capfd) == "pod may still become registered: the answer to its hello was not waited for"


def test_a_signal_during_newcontainer_is_the_processs(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.exit(process.proxy.wait_for("killcontainer").arguments["signal"])

    proxy.script = script
    proxy.when_asked["newcontainer"] = interrupt(signal.SIGTERM)
    assert ctl(proxy, *RUN, "x") == signal.SIGTERM
    assert proxy.names == [*SETUP, "killcontainer", *DESTROYED]


def test_a_signal_during_exec(proxy: FakeProxy) -> None:
    proxy.when_asked["execcmd"] = interrupt(signal.SIGTERM)
    proxy.script = lambda process: None
    assert ctl(proxy, "exec", "pod", "x") == 143
    assert proxy.names == ["attach", "allocateIO", "execcmd"]


def test_signals_that_are_ignored_stay_ignored(proxy: FakeProxy) -> None:
    """As under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        proxy.when_asked["startpod"] = interrupt(signal.SIGHUP)
        assert ctl(proxy, *RUN, "x") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_put_back(proxy: FakeProxy) -> None:
    before = {signum: signal.getsignal(signum) for signum in ENDING}
    assert ctl(proxy, *RUN, "x") == 0
    assert {signum: signal.getsignal(signum) for signum in ENDING} == before
