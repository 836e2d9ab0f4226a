"""-t: the user's terminal is the process's for a while."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import termios
from collections.abc import Iterator

import pytest

from cc_proxy.ctl.errors import Interrupted
from cc_proxy.ctl.requests import WindowSize
from cc_proxy.ctl.terminal import Terminal
from tests.ctl.fake_proxy import ERROR, FakeProcess, FakeProxy
from tests.ctl.running import RUN, popen, read_until
from tests.ctl.window import LFLAG, Window

RUN_T = (*RUN, "-t", "sh")
RUN_TI = (*RUN, "-ti", "sh")


def says_ready(process: FakeProcess) -> None:
    process.out(b"ready\n")


def waits_for_a_key(process: FakeProcess) -> None:
    process.out(b"ready\n")
    process.exit(process.receive().payload[0])


def test_what_is_asked_for(proxy: FakeProxy, window: Window) -> None:
    with window.start(proxy.path, *RUN_TI) as child:
        assert child.wait() == 0
    assert proxy.wait_for("allocateIO").arguments == {"nStreams": 1}
    process = proxy.wait_for("newcontainer").arguments["process"]
    assert process["terminal"] is True
    assert (process["stdio"], process["stderr"]) == (1, 0)
    assert (process["rows"], process["columns"]) == (24, 80)


def test_the_terminal_is_raw_and_then_as_before(proxy: FakeProxy, window: Window) -> None:
    before = window.mode()
    assert not window.is_raw()
    proxy.script = waits_for_a_key
    with window.start(proxy.path, *RUN_TI) as child:
        assert read_until(window.user, b"\n") == b"ready\n"
        assert window.is_raw()
        assert not window.mode()[LFLAG] & termios.ISIG
        os.write(window.user, b"\x05")
        assert child.wait() == 5
    assert window.mode() == before


def test_typing(proxy: FakeProxy, window: Window) -> None:
    """Each key goes at once and as it is, those included that are signals and end of file elsewhere."""
    keys = [b"a", b"\r", b"\x03", b"\x04", b"\x1c", b"\x1a", b"\xc3\xa4", b"\x00"]

    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        while (payload := process.receive().payload) != b"q":
            process.out(b"<" + payload + b">\n")
        process.exit(0)

    proxy.script = script
    with window.start(proxy.path, *RUN_TI) as child:
        read_until(window.user, b"ready\n")
        for key in keys:
            os.write(window.user, key)
            assert read_until(window.user, b">\n") == b"<" + key + b">\n"
        os.write(window.user, b"q")
        assert child.wait() == 0
    assert "killcontainer" not in proxy.names


def test_exec_in_a_terminal(proxy: FakeProxy, window: Window) -> None:
    before = window.mode()
    proxy.script = waits_for_a_key
    with window.start(proxy.path, "exec", "-it", "pod", "sh") as child:
        read_until(window.user, b"ready\n")
        assert window.is_raw()
        os.write(window.user, b"\x07")
        assert child.wait() == 7
    assert window.mode() == before
    assert proxy.wait_for("execcmd").arguments["process"]["rows"] == 24


def test_what_was_typed_before_is_not_lost(proxy: FakeProxy, window: Window) -> None:
    seen = []

    def script(process: FakeProcess) -> None:
        typed = b""
        while not typed.endswith(b"!"):
            typed += process.receive().payload
        seen.append(typed)
        process.exit(0)

    proxy.script = script

    def type_early() -> None:
        os.write(window.user, b"early")

    proxy.when_asked["hello"] = type_early
    with window.start(proxy.path, *RUN_TI) as child:
        proxy.wait_for("newcontainer")
        os.write(window.user, b"!")
        assert child.wait() == 0
    assert seen == [b"early!"]


# The window's size ---


def test_the_size_is_told_at_the_start_and_whenever_it_changes(proxy: FakeProxy, window: Window) -> None:
    proxy.script = waits_for_a_key
    with window.start(proxy.path, *RUN_TI) as child:
        assert proxy.wait_for("winsize").arguments == {"seq": 1, "row": 24, "column": 80}
        for count, (rows, columns) in enumerate([(25, 80), (50, 132)], start=2):
            termios.tcsetwinsize(window.user, (rows, columns))  # the system sends the SIGWINCH
            asked = proxy.wait_for("winsize", count).arguments
            assert asked == {"seq": 1, "row": rows, "column": columns}
        os.write(window.user, b"\x00")
        assert child.wait() == 0


def test_a_size_that_is_not_acknowledged_does_not_stop_the_streams(proxy: FakeProxy, window: Window) -> None:
    proxy.script = waits_for_a_key
    proxy.hold("winsize")
    with window.start(proxy.path, *RUN_TI) as child:
        proxy.wait_for("winsize")
        os.write(window.user, b"\x09")
        assert child.wait() == 9


def test_without_t_the_size_is_nobodys_business(proxy: FakeProxy, window: Window) -> None:
    proxy.script = waits_for_a_key
    before = window.mode()
    with window.start(proxy.path, *RUN, "-i", "cat") as child:
        read_until(window.user, b"ready\r\n")
        assert window.mode() == before
        child.send_signal(signal.SIGWINCH)
        os.write(window.user, b"\n")
        assert child.wait() == 10
    assert "winsize" not in proxy.names


# A terminal that is not read ---


@contextlib.contextmanager
def stalled(proxy: FakeProxy, window: Window) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command whose terminal takes nothing more."""

    def script(process: FakeProcess) -> None:
        process.io.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(6):
            process.out(bytes(10_000))  # a terminal takes 20,000 at most, the rest waits in the command
        process.proxy.record("all out")
        if process.receive().payload == b"x":
            process.proxy.record("key")

    proxy.script = script
    with window.start(proxy.path, "exec", "-ti", "pod", "sh") as child:
        try:
            proxy.wait_for("all out")
            yield child
        finally:
            child.kill()


def test_a_terminal_that_is_not_read_keeps_nothing_else(proxy: FakeProxy, window: Window) -> None:
    with stalled(proxy, window):
        termios.tcsetwinsize(window.user, (50, 132))
        assert proxy.wait_for("winsize", 2).arguments["row"] == 50
        os.write(window.user, b"x")
        proxy.wait_for("key")


def test_a_signal_ends_it_though_its_terminal_is_not_read(proxy: FakeProxy, window: Window) -> None:
    with stalled(proxy, window) as child:
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM


def test_the_users_terminal_stays_in_its_mode(proxy: FakeProxy, window: Window) -> None:
    """A shell shares it, and expects to be made to wait."""
    with stalled(proxy, window):
        assert os.get_blocking(window.terminal)


def test_a_terminal_is_written_to_the_last_byte(proxy: FakeProxy, window: Window) -> None:
    data = bytes(range(256)) * 1000

    def script(process: FakeProcess) -> None:
        for start in range(0, len(data), 8000):
            process.out(data[start : start + 8000])
        process.out(b"the end")
        process.exit(3)

    proxy.script = script
    with window.start(proxy.path, "exec", "-ti", "pod", "sh") as child:
        assert read_until(window.user, b"the end") == data + b"the end"
        assert child.wait() == 3


# Ends of all kinds ---


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_it(proxy: FakeProxy, window: Window, signum: signal.Signals) -> None:
    before = window.mode()
    proxy.script = says_ready
    with window.start(proxy.path, *RUN_TI) as child:
        read_until(window.user, b"ready\n")
        child.send_signal(signum)
        assert child.wait() == 128 + signum
    assert window.mode() == before
    assert proxy.names_but("winsize")[-4:] == ["attach", "killcontainer", "destroypod", "bye"]


def test_a_vm_that_goes_away(proxy: FakeProxy, window: Window) -> None:
    before = window.mode()

    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.receive()
        process.io.close()

    proxy.script = script
    with window.start(proxy.path, *RUN_TI) as child:
        read_until(window.user, b"ready\n")
        os.write(window.user, b"x")
        # In the terminal's own mode again: a whole new line.
        assert read_until(window.user, b"\n").endswith(b"(its log may say it)\r\n")
        assert child.wait() == 125
    assert window.mode() == before


def test_a_command_that_cannot_be_started(proxy: FakeProxy, window: Window) -> None:
    before = window.mode()
    proxy.refused["newcontainer"] = ERROR
    with window.start(proxy.path, *RUN_TI) as child:
        said = read_until(window.user, b"\r\n")
        assert said.startswith(f"cc-proxyctl: cannot start 'sh': {ERROR} (".encode())
        assert child.wait() == 127
    assert window.mode() == before


def test_a_terminal_that_hangs_up(proxy: FakeProxy, window: Window) -> None:
    proxy.script = says_ready
    with window.start(proxy.path, *RUN_TI) as child:
        read_until(window.user, b"ready\n")
        window.hang_up()
        assert child.wait() == 128 + signal.SIGHUP
    assert proxy.names_but("winsize")[-4:] == ["attach", "killcontainer", "destroypod", "bye"]


@pytest.mark.parametrize("argv", [RUN_TI, ("exec", "-ti", "pod", "sh")], ids=["run", "exec"])
def test_a_terminal_of_somebody_else_that_hangs_up(
    proxy: FakeProxy, window: Window, argv: tuple[str, ...]
) -> None:
    """Nobody sends a SIGHUP then."""
    proxy.script = says_ready
    with popen(proxy.path, *argv, stdin=window.terminal, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        window.hang_up()
        assert child.wait() == 128 + signal.SIGHUP


def test_ctrl_c_is_the_way_out_where_nobody_reads_keys(proxy: FakeProxy, window: Window) -> None:
    before = window.mode()
    proxy.script = says_ready
    with window.start(proxy.path, *RUN_T) as child:
        assert read_until(window.user, b"\n") == b"ready\n"
        assert window.is_raw()
        os.write(window.user, b"\x03")
        assert child.wait() == 128 + signal.SIGINT
    assert window.mode() == before


def test_without_i_nothing_is_sent(proxy: FakeProxy, window: Window) -> None:
    """Not even the end of stdin, which a terminal does not know."""

    def script(process: FakeProcess) -> None:
        process.proxy.wait_for("winsize")
        process.exit(0)
        with pytest.raises(EOFError):
            process.receive()

    proxy.script = script
    with window.start(proxy.path, *RUN_T) as child:
        assert child.wait() == 0


def test_output_to_a_pipe(proxy: FakeProxy, window: Window) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"a\r\nb\r\n")
        process.exit(0)

    proxy.script = script
    with popen(proxy.path, *RUN_TI, stdin=window.terminal, stdout=subprocess.PIPE) as child:
        assert child.communicate()[0] == b"a\r\nb\r\n"
        assert child.returncode == 0


def test_ctrl_c_without_t_is_passed_on(proxy: FakeProxy, window: Window) -> None:
    def script(process: FakeProcess) -> None:
        process.out(b"ready\n")
        process.exit(process.proxy.wait_for("killcontainer").arguments["signal"])

    proxy.script = script
    with window.start(proxy.path, *RUN, "x") as child:
        read_until(window.user, b"ready\r\n")
        os.write(window.user, b"\x03")
        assert child.wait() == signal.SIGINT


def test_a_window_without_a_size(proxy: FakeProxy, window: Window) -> None:
    termios.tcsetwinsize(window.terminal, (0, 0))
    proxy.script = waits_for_a_key
    with window.start(proxy.path, *RUN_TI) as child:
        read_until(window.user, b"ready\n")
        os.write(window.user, b"\x08")
        assert child.wait() == 8
    assert "winsize" not in proxy.names
    assert "rows" not in proxy.wait_for("newcontainer").arguments["process"]


def test_a_terminal_that_hangs_up_before_it_is_raw(window: Window) -> None:
    terminal = Terminal(window.terminal)
    window.hang_up()
    assert terminal.size() == WindowSize(0, 0)
    with pytest.raises(Interrupted) as caught, terminal.raw(keys_are_signals=False):
        pytest.fail("it is no terminal any more")
    assert caught.value.signum == signal.SIGHUP
