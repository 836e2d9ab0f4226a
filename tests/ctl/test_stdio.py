"""The standard streams: whatever they are open on, whoever does not keep up."""

from __future__ import annotations

import os
import select
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cc_proxy.api import encode_frame
from tests.ctl.fake_proxy import FakeProcess, FakeProxy
from tests.ctl.running import RUN, popen, popen_piped, read_until

INTERACTIVE = (*RUN, "-i", "x")
#: More than all buffers on the way, and less than what the command may hold at once.
MUCH = 32 * 1024 * 1024
MOST_HELD = 2 * 1024 * 1024
PATTERN = bytes(range(256)) * 4096


def echoes(process: FakeProcess) -> None:
    """Send stdin back until it ends."""
    while payload := process.receive().payload:
        process.out(payload)
    process.exit(0)


def tells_how_much(process: FakeProcess) -> None:
    process.out(str(len(process.stdin())).encode())
    process.exit(0)


def test_10_mib_there_and_back(proxy: FakeProxy) -> None:
    proxy.script = echoes
    data = os.urandom(10 * 1024 * 1024)
    with popen_piped(proxy.path, *INTERACTIVE) as child:
        output, errors = child.communicate(data)
    assert output == data
    assert (errors, child.returncode) == (b"", 0)


def test_frames_of_stdin_are_not_too_long(proxy: FakeProxy) -> None:
    lengths: list[int] = []

    def script(process: FakeProcess) -> None:
        while payload := process.receive().payload:
            lengths.append(len(payload) + 12)
        process.exit(0)

    proxy.script = script
    with popen_piped(proxy.path, *INTERACTIVE) as child:
        child.communicate(PATTERN)
    assert max(lengths) == 8192
    assert sum(lengths) - 12 * len(lengths) == len(PATTERN)


def test_stdout_and_stderr_come_out_apart(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        for number in range(1000):
            process.out(b"out %d\n" % number)
            process.err(b"err %d\n" % number)
        process.exit(0)

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        output, errors = child.communicate()
    assert output == b"".join(b"out %d\n" % number for number in range(1000))
    assert errors == b"".join(b"err %d\n" % number for number in range(1000))


def test_stdout_and_stderr_into_one_pipe_keep_their_order(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        for number in range(20_000):
            (process.err if number % 3 else process.out)(b"%d\n" % number)
        process.exit(0)

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x", stderr=subprocess.STDOUT) as child:
        output, _ = child.communicate()
    assert output == b"".join(b"%d\n" % number for number in range(20_000))


# What stdin can be ---


@pytest.mark.parametrize(
    ("opened", "length"),
    [
        pytest.param(lambda path: os.open(path, os.O_RDONLY), 1_000_000, id="file"),
        pytest.param(lambda path: os.open(os.devnull, os.O_RDONLY), 0, id="/dev/null"),
    ],
)
def test_stdin_is_a_file(
    proxy: FakeProxy, tmp_path: Path, opened: Callable[[Path], int], length: int
) -> None:
    proxy.script = tells_how_much
    path = tmp_path / "input"
    path.write_bytes(bytes(1_000_000))
    stdin = opened(path)
    try:
        with popen_piped(proxy.path, *INTERACTIVE, stdin=stdin) as child:
            assert child.communicate() == (str(length).encode(), b"")
    finally:
        os.close(stdin)


def test_stdin_is_closed(proxy: FakeProxy) -> None:
    proxy.script = tells_how_much
    with popen_piped(proxy.path, *INTERACTIVE, stdin=None, preexec_fn=lambda: os.close(0)) as child:
        assert child.communicate() == (b"0", b"")
    assert child.returncode == 0


def test_a_file_that_a_library_keeps_open_does_not_become_stdin(proxy: FakeProxy, tmp_path: Path) -> None:
    """As ctypes does with libffi on some Pythons."""
    (tmp_path / "sitecustomize.py").write_text(OPENS_A_FILE)
    proxy.script = tells_how_much
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with popen_piped(
        proxy.path, *INTERACTIVE, stdin=None, preexec_fn=lambda: os.close(0), env=environment
    ) as child:
        assert child.communicate() == (b"0", b"")
    assert child.returncode == 0


OPENS_A_FILE = """
import os, sys

class Keeper:
    def find_spec(self, name, path=None, target=None):
        if name == "msgspec":
            os.open(__file__, os.O_RDONLY)

sys.meta_path.insert(0, Keeper())
"""


def test_stdin_is_a_socket(proxy: FakeProxy) -> None:
    proxy.script = echoes
    ours, theirs = socket.socketpair()
    with ours, popen_piped(proxy.path, *INTERACTIVE, stdin=theirs, stdout=theirs) as child:
        theirs.close()
        ours.sendall(b"hello")
        assert ours.recv(5, socket.MSG_WAITALL) == b"hello"
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        assert child.wait() == 0


def test_stdin_is_non_blocking(proxy: FakeProxy) -> None:
    proxy.script = echoes
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with popen_piped(proxy.path, *INTERACTIVE, stdin=reader) as child:
        os.close(reader)
        proxy.wait_for("newcontainer")
        os.write(writer, b"hello")
        assert child.stdout is not None
        assert child.stdout.read(5) == b"hello"
        os.close(writer)
    assert child.returncode == 0


def test_stdin_cannot_be_read(proxy: FakeProxy) -> None:
    stdin = os.open(os.devnull, os.O_WRONLY)
    try:
        with popen_piped(proxy.path, *INTERACTIVE, stdin=stdin) as child:
            output = child.communicate()
    finally:
        os.close(stdin)
    assert output == (b"", b"cc-proxyctl: cannot read standard input: Bad file descriptor\n")
    assert child.returncode == 125
    assert proxy.names[-3:] == ["killcontainer", "destroypod", "bye"]


def test_without_i_stdin_is_not_touched(proxy: FakeProxy) -> None:
    proxy.script = tells_how_much
    reader, writer = os.pipe()
    os.write(writer, b"for somebody else")
    with popen_piped(proxy.path, *RUN, "x", stdin=reader) as child:
        assert child.communicate() == (b"0", b"")
    assert os.read(reader, 100) == b"for somebody else"
    os.close(reader)
    os.close(writer)


def test_the_process_ends_before_stdin_does(proxy: FakeProxy) -> None:
    proxy.script = lambda process: process.exit(6)
    with popen_piped(proxy.path, *INTERACTIVE) as child:
        assert child.wait() == 6


def test_stdin_that_the_proxy_refuses(proxy: FakeProxy) -> None:
    """It may close a session for writing and still say how the process ended."""

    def script(process: FakeProcess) -> None:
        process.receive()
        process.io.shutdown(socket.SHUT_RD)
        process.out(b"enough\n")
        process.proxy.wait_for("go")
        process.exit(2)

    proxy.script = script
    with popen_piped(proxy.path, *INTERACTIVE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"1")
        child.stdin.flush()
        assert child.stdout.readline() == b"enough\n"
        child.stdin.write(b"2")
        child.stdin.close()
        proxy.record("go")
        assert child.wait() == 2


# Who does not keep up ---


def test_stdout_that_is_not_read_stops_the_process(proxy: FakeProxy) -> None:
    sent: list[int] = []

    def script(process: FakeProcess) -> None:
        frame = encode_frame(1, PATTERN[:8180])
        process.io.settimeout(0.5)
        stalled_at = send_all(process.io, frame * (MUCH // len(frame)))
        sent.append(stalled_at)
        process.proxy.record("stalled")

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        proxy.wait_for("stalled")
        assert sent[0] < MOST_HELD
        child.kill()
        child.communicate()


def test_a_slow_reader_gets_everything(proxy: FakeProxy) -> None:
    count = 2000

    def script(process: FakeProcess) -> None:
        for _ in range(count):
            process.out(PATTERN[:8180])
        process.exit(5)
        process.proxy.record("all sent")

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        assert child.stdout is not None
        size = 0
        while data := os.read(child.stdout.fileno(), 1000):
            size += len(data)
        assert size == count * 8180
        assert child.wait() == 5


def test_output_is_written_to_the_last_byte_before_exiting(proxy: FakeProxy) -> None:
    """The exit status is known long before stdout has taken all."""

    def script(process: FakeProcess) -> None:
        process.out(bytes(60_000))
        process.out(bytes(60_000))
        process.exit(1)
        process.proxy.record("all sent")

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "x") as child:
        proxy.wait_for("all sent")
        output, _ = child.communicate()
    assert len(output) == 120_000
    assert child.returncode == 1


def test_a_proxy_that_takes_no_stdin_stops_the_reading_of_it(proxy: FakeProxy) -> None:
    proxy.script = lambda process: None
    with popen_piped(proxy.path, *INTERACTIVE) as child:
        assert child.stdin is not None
        proxy.wait_for("newcontainer")
        os.set_blocking(child.stdin.fileno(), False)
        assert write_until_stalled(child.stdin.fileno(), MUCH) < MOST_HELD
        child.kill()


def test_stdin_that_waits_does_not_stop_output(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        process.proxy.wait_for("stalled")
        process.out(b"here\n")

    proxy.script = script
    with popen_piped(proxy.path, *INTERACTIVE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        proxy.wait_for("newcontainer")
        os.set_blocking(child.stdin.fileno(), False)
        write_until_stalled(child.stdin.fileno(), MUCH)
        proxy.record("stalled")
        assert child.stdout.readline() == b"here\n"
        child.kill()


def send_all(sock: socket.socket, data: bytes) -> int:
    """Send until the socket takes no more for its timeout; returns how much it took."""
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left, socket.MSG_NOSIGNAL) :]
        except TimeoutError:
            break
    return len(data) - len(left)


def write_until_stalled(fd: int, size: int) -> int:
    """Write to a non-blocking pipe until it takes no more for a while; returns how much it took."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    written = 0
    while written < size and poll.poll(500):
        written += os.write(fd, PATTERN[:65536])
    return written


# Outputs that are closed ---


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("argv", "names"),
    [(RUN, ["killcontainer", "destroypod", "bye"]), (("exec", "pod"), ["attach", "allocateIO", "execcmd"])],
    ids=["run", "exec"],
)
def test_a_closed_output_ends_it_silently(
    proxy: FakeProxy, stream: str, argv: tuple[str, ...], names: list[str]
) -> None:
    def script(process: FakeProcess) -> None:
        say = process.out if stream == "stdout" else process.err
        say(b"first\n")
        process.proxy.wait_for("closed")
        while True:
            say(b"more\n")

    proxy.script = script
    with popen_piped(proxy.path, *argv, "x") as child:
        pipe = getattr(child, stream)
        assert read_until(pipe.fileno(), b"\n") == b"first\n"
        pipe.close()
        proxy.record("closed")
        assert child.wait() == 128 + 13
        other = child.stderr if stream == "stdout" else child.stdout
        assert other is not None
        assert other.read() == b""
    assert proxy.names_but("closed")[-3:] == names


def test_head(proxy: FakeProxy) -> None:
    def script(process: FakeProcess) -> None:
        while True:
            process.out(b"y\n")

    proxy.script = script
    with popen_piped(proxy.path, *RUN, "yes") as child:
        head = subprocess.run(["head", "-n", "1"], stdin=child.stdout, capture_output=True, check=True)
        assert child.stdout is not None
        child.stdout.close()
        assert child.wait() == 141
        assert child.stderr is not None
        assert child.stderr.read() == b""
    assert head.stdout == b"y\n"


def test_stdout_is_closed_from_the_start(proxy: FakeProxy) -> None:
    proxy.script = lambda process: process.out(b"x")
    with popen_piped(proxy.path, *RUN, "x", stdout=None, preexec_fn=lambda: os.close(1)) as child:
        _, errors = child.communicate()
    assert errors == b"cc-proxyctl: cannot write to standard output: Bad file descriptor\n"
    assert child.returncode == 125
    assert proxy.names[-3:] == ["killcontainer", "destroypod", "bye"]


def test_all_are_closed_from_the_start(proxy: FakeProxy) -> None:
    """No socket takes their place."""
    proxy.script = tells_how_much
    proxy.refused["attach"] = "no"
    with popen(proxy.path, "exec", "-i", "pod", "x", preexec_fn=lambda: os.closerange(0, 3)) as child:
        assert child.wait() == 125


def test_stdout_is_full(proxy: FakeProxy) -> None:
    proxy.script = lambda process: process.out(b"x")
    with Path("/dev/full").open("wb") as full, popen_piped(proxy.path, *RUN, "x", stdout=full) as child:
        _, errors = child.communicate()
    assert errors == b"cc-proxyctl: cannot write to standard output: No space left on device\n"
    assert child.returncode == 125


@pytest.mark.parametrize("argv", [["attach", "pod"], ["--help"], ["--version"]], ids=" ".join)
def test_what_is_printed_finds_stdout_closed_or_full(
    proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse ignores what it cannot write
    with Path("/dev/full").open("wb") as full, popen_piped(proxy.path, *argv, stdout=full) as child:
        _, errors = child.communicate()
    assert errors == b"cc-proxyctl: cannot write to standard output: No space left on device\n"
    assert child.returncode == 125
    reader, writer = os.pipe()
    os.close(reader)
    with popen_piped(proxy.path, *argv, stdout=writer) as child:
        os.close(writer)
        _, errors = child.communicate()
    assert errors == b""
    assert child.returncode == 141
