"""Signals while a process runs."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest

from cc_proxy.ctl import attendance
from cc_proxy.ctl import signals as signals_module
from cc_proxy.ctl.errors import Interrupted
from cc_proxy.ctl.signals import ENDING, Signals
from tests.clock import Clock
from tests.ctl.fake_proxy import FakeProcess, FakeProxy
from tests.ctl.running import RUN, ctl, interrupt, popen_piped
from tests.ctl.window import Window
from tests.wire.support import wait_until

#: Seconds that a step of clearing up may take, unless the user insists on an end.
GRACE = 5.0


def ends_by_signals(count: int) -> Callable[[FakeProcess], None]:
    """Return a process that ends when it has got `count` signals, with the last one's number."""

    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        for number in range(1, count + 1):
            asked = process.proxy.wait_for("killcontainer", number).arguments
            process.out(b"got %d\n" % asked["signal"])
        process.exit(asked["signal"])

    return script


def line(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout is not None
    return child.stdout.readline()


def unread(child: subprocess.Popen[bytes]) -> int:
    """Bytes that wait in its stdout."""
    assert child.stdout is not None
    return int.from_bytes(fcntl.ioctl(child.stdout, termios.FIONREAD, bytes(4)), sys.byteorder)


def untaken(process: FakeProcess) -> int:
    """What it has sent and the command has not read, in bytes of the system's own count."""
    return int.from_bytes(fcntl.ioctl(process.io, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("signum", ENDING, ids=lambda signum: signum.name)
def test_a_signal_is_passed_on(proxy: FakeProxy, signum: signal.Signals) -> None:
    proxy.script = ends_by_signals(1)
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        child.send_signal(signum)
        assert line(child) == b"got %d\n" % signum
        assert child.wait() == signum
    asked = proxy.wait_for("killcontainer").arguments
    assert asked == {"container": "pod", "signal": signum}
    assert proxy.names[-3:] == ["attach", "destroypod", "bye"]


def test_each_signal_is_passed_on(proxy: FakeProxy) -> None:
    proxy.script = ends_by_signals(3)
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            child.send_signal(signum)
            assert line(child) == b"got %d\n" % signum
        assert child.wait() == signal.SIGTERM


def test_a_signal_is_passed_on_while_nobody_reads_stdout(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        for _ in range(100):
            process.out(bytes(10_000))
        process.exit(process.proxy.wait_for("killcontainer").arguments["signal"])

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        child.terminate()
        proxy.wait_for("killcontainer")
        child.communicate()
        assert child.returncode == signal.SIGTERM


def test_a_command_that_is_not_answered_does_not_stop_the_streams(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.proxy.wait_for("killcontainer")
        process.out(process.receive().payload)
        process.exit(7)

    proxy.script = script
    proxy.hold("killcontainer")
    with popen_piped(proxy.path, *RUN, "-i", "x") as child:
        assert line(child) == b"ready\n"
        child.terminate()
        proxy.wait_for("killcontainer")
        assert child.stdin is not None
        child.stdin.write(b"still here\n")
        child.stdin.flush()
        assert line(child) == b"still here\n"
        assert child.wait() == 7


def test_a_command_that_is_refused_or_lost_does_not_stop_the_streams(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.proxy.wait_for("killcontainer", 2)
        process.out(b"still here\n")
        process.proxy.wait_for("go")
        process.exit(7)

    proxy.script = script
    proxy.refused["killcontainer"] = "no"
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        child.send_signal(signal.SIGUSR1)
        proxy.wait_for("killcontainer")
        proxy.hangs_up_on.add("killcontainer")
        child.send_signal(signal.SIGUSR2)
        assert line(child) == b"still here\n"
        child.send_signal(signal.SIGUSR1)
        proxy.record("go")
        assert child.wait() == 7
        assert child.stderr is not None
        assert child.stderr.read() == b""


def test_a_signal_when_the_process_has_ended_ends_the_writing_of_its_output(proxy: FakeProxy) -> None:
    """Nobody is left to pass it on to."""

    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.out(bytes(60_000))
        process.out(bytes(60_000))
        process.exit(0)
        wait_until(lambda: untaken(process) == 0, "the exit status is taken")
        process.proxy.record("ended")

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        proxy.wait_for("ended")
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM
    assert proxy.names_but("ended")[-2:] == ["destroypod", "bye"]


def test_a_second_signal_ends_run_if_nobody_reads_stdout(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.out(bytes(60_000))
        process.out(bytes(60_000))
        process.proxy.record("stalled")

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        proxy.wait_for("stalled")
        wait_until(lambda: unread(child) >= 60_000, "the pipe is full")
        child.send_signal(signal.SIGINT)
        proxy.wait_for("killcontainer")
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM
    assert proxy.names[-2:] == ["destroypod", "bye"]


def ignores_signals(process: FakeProcess) -> None:
    process.out(b"ready\n")


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM])
def test_the_third_signal_ends_run_whatever_the_process_does(proxy: FakeProxy, last: signal.Signals) -> None:
    """And a VM that hangs does not keep it for long."""
    proxy.script = ignores_signals
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        for count, signum in enumerate((signal.SIGINT, signal.SIGTERM), start=1):
            child.send_signal(signum)
            assert proxy.wait_for("killcontainer", count).arguments["signal"] == signum
        proxy.hold("destroypod")
        began = time.monotonic()
        child.send_signal(last)
        assert child.wait() == 128 + last
        assert time.monotonic() - began < GRACE
    assert proxy.wait_for("killcontainer", 3).arguments["allProcesses"]
    assert proxy.names[-4:] == ["attach", "killcontainer", "destroypod", "bye"]


def test_signals_that_come_far_apart_are_all_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.rule(monkeypatch, signals_module)
    with Signals() as signals:
        for _ in range(4):
            signal.raise_signal(signal.SIGINT)
            clock.now += 3.0
            assert not signals.insistent
        clock.now -= 2.0
        signal.raise_signal(signal.SIGTERM)
        assert signals.insistent


def test_signals_that_ask_for_no_end_do_not_insist() -> None:
    with Signals() as signals:
        for signum in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT):
            signal.raise_signal(signum)
        assert not signals.insistent


def test_the_third_signal_cuts_clearing_up_short(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    def script(process: FakeProcess) -> None:
        process.proxy.wait_for("killcontainer")
        interrupt(signal.SIGTERM)()
        process.proxy.wait_for("killcontainer", 2)
        process.exit(7)

    proxy.script = script
    proxy.when_asked["newcontainer"] = interrupt(signal.SIGINT)
    proxy.when_asked["destroypod"] = interrupt(signal.SIGINT)
    proxy.hold("destroypod")
    proxy.hold("bye")
    began = time.monotonic()
    assert ctl(proxy, *RUN, "x") == 7
    assert time.monotonic() - began < GRACE
    assert proxy.names[-3:] == ["attach", "destroypod", "bye"]
    late = f"{proxy.path} has not answered bye in time"
    assert capfd.readouterr().err.startswith(f"cc-proxyctl: pod may still be registered: {late}")


def killed(process: FakeProcess) -> None:
    process.out(b"ready\n")
    process.proxy.wait_for("killcontainer")
    process.exit(0)


def test_a_signal_that_ends_the_process(proxy: FakeProxy) -> None:
    """The agent reports 0 then."""
    proxy.script = killed
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM


def test_the_last_signal_has_ended_the_process(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.proxy.wait_for("killcontainer")
        process.out(b"ignored\n")
        process.proxy.wait_for("killcontainer", 2)
        process.exit(0)

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert line(child) == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert line(child) == b"ignored\n"
        child.send_signal(signal.SIGQUIT)
        assert child.wait() == 128 + signal.SIGQUIT


def test_a_signal_that_was_long_ago_has_not_ended_the_process(
    proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.rule(monkeypatch, attendance)

    def script(process: FakeProcess) -> None:
        process.proxy.wait_for("killcontainer")
        clock.now += 5.1
        process.exit(0)

    proxy.script = script
    proxy.when_asked["newcontainer"] = interrupt(signal.SIGUSR1)
    assert ctl(proxy, *RUN, "x") == 0


@pytest.mark.parametrize(
    ("options", "end"), [(("-i",), (1, b"")), (("-ti",), (1, b"\x04")), (("-t",), (1, b"\x04"))]
)
def test_input_ends_with_its_client(
    proxy: FakeProxy, window: Window, options: tuple[str, ...], end: tuple[int, bytes]
) -> None:
    """To a terminal the end is a Ctrl-D."""
    seen = []

    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        if "-t" not in options:
            assert process.receive().payload == b"typed\n"
            process.out(b"go\n")
        seen.append(process.receive())
        with pytest.raises(EOFError):
            process.receive()
        process.proxy.record("ended")

    proxy.script = script
    with popen_piped(proxy.path, "exec", *options, "pod", "x", stdin=window.terminal) as child:
        assert line(child) == b"ready\n"
        if "-t" not in options:
            os.write(window.user, b"typed\n")
            assert line(child) == b"go\n"
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM
    proxy.wait_for("ended")
    assert seen == [end]


def test_a_signal_ends_the_input_that_had_not_begun(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        assert process.stdin() == b""
        process.proxy.record("input ended")

    proxy.script = script
    with popen_piped(proxy.path, "exec", "-i", "pod", "x") as child:
        assert line(child) == b"ready\n"
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM
        proxy.wait_for("input ended")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_exec_and_not_the_container(proxy: FakeProxy, signum: signal.Signals) -> None:
    proxy.script = lambda process: process.out(b"ready\n")
    with popen_piped(proxy.path, "exec", "pod", "x") as child:
        assert line(child) == b"ready\n"
        child.send_signal(signum)
        assert child.wait() == 128 + signum
    assert proxy.names == ["attach", "allocateIO", "execcmd"]


# Signals ---


def test_signals_wait_until_they_are_taken() -> None:
    with Signals() as signals:
        assert signals.take() == []
        for signum in (signal.SIGUSR1, signal.SIGWINCH, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(signum)
        assert signals.take() == [signal.SIGUSR1, signal.SIGWINCH, signal.SIGINT]
        assert signals.take() == []


def test_a_signal_interrupts_only_where_it_may() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGWINCH)
        with signals.may_interrupt():
            signal.raise_signal(signal.SIGWINCH)
        with pytest.raises(Interrupted) as caught, signals.may_interrupt():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.status == 143
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_came_before_interrupts_too() -> None:
    reached = []
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        with signals.may_interrupt(tolerate=1):
            reached.append("tolerated")
        with pytest.raises(Interrupted), signals.may_interrupt():
            reached.append("not tolerated")
    assert reached == ["tolerated"]


def test_interrupting_is_not_interrupted_again() -> None:
    def clear_up_when_interrupted(signals: Signals) -> None:
        with signals.may_interrupt():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)

    with Signals() as signals, pytest.raises(Interrupted) as caught:
        clear_up_when_interrupted(signals)
    assert caught.value.signum == signal.SIGTERM


def test_a_flood_of_signals_does_not_block() -> None:
    with Signals() as signals:
        for _ in range(70_000):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert set(signals.take()) == {signal.SIGUSR1}
