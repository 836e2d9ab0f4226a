"""Everything together, as processes: the daemon, embedded agents, cc-proxyctl and the README's program."""

import contextlib
import hashlib
import io
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.api import Client, Frame, FrameParser, encode_frame
from tests.agent.host import until
from tests.ctl.fake_proxy import FakeProcess, FakeProxy

README = Path(__file__).parent.parent / "README.md"
MIB = 1024 * 1024
#: Prints that it is up, and stays until it is killed.
STAYS = ("sh", "-c", "echo up; exec sleep 1000")


class Proxy:
    """A daemon, and cc-proxyctl talking to it."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = str(socket_path)

    def start(self, *arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "cc_proxy.cli.ctl", "--socket-path", self.socket_path, *arguments]
        return subprocess.Popen(command, stdin=pipe, stdout=stdout, stderr=pipe)

    def run(self, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        with self.start(*arguments) as process:
            out, err = process.communicate(stdin, timeout=50)
        return process.returncode, out, err

    @contextlib.contextmanager
    def pod(self, name: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A pod that is up and stays."""
        with self.start("run", "--local", "--id", name, "--", *STAYS) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == b"up\n"
                yield process
            finally:
                process.terminate()
                process.communicate(timeout=20)


@pytest.fixture
def proxy(tmp_sock_dir: Path) -> Iterator[Proxy]:
    path = tmp_sock_dir / "run" / "proxy.sock"
    command = [sys.executable, "-m", "cc_proxy", "--socket-path", str(path), "--log-level", "info"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as daemon:
        assert daemon.stderr
        assert b'"ready"' in daemon.stderr.readline()
        try:
            yield Proxy(path)
        finally:
            daemon.terminate()
            _, log = daemon.communicate(timeout=20)
        assert daemon.returncode == 0
        assert b"Traceback" not in log
        assert not path.exists()


def test_a_process_from_start_to_exit_status(proxy: Proxy) -> None:
    script = "read line; echo out $line; echo err >&2; exit 7"
    result = proxy.run("run", "--local", "-i", "--", "sh", "-c", script, stdin=b"in\n")
    assert result == (7, b"out in\n", b"err\n")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4_084, 4_085, 100_000, MIB, 10 * MIB])
def test_stdin_arrives_whole(proxy: Proxy, size: int) -> None:
    data = hashlib.shake_128(b"stdin").digest(size)
    status, out, err = proxy.run("run", "--local", "-i", "--", "sha256sum", stdin=data)
    assert (status, err) == (0, b"")
    assert out[:64].decode() == hashlib.sha256(data).hexdigest()


def test_stdin_arrives_whole_while_others_stream(proxy: Proxy) -> None:
    data = hashlib.shake_128(b"stdin").digest(MIB)
    endless = ("exec", "p", "--", "sh", "-c", "echo up >&2; exec yes")
    with proxy.pod("p"), proxy.start(*endless, stdout=subprocess.DEVNULL) as noisy:
        assert noisy.stderr
        assert noisy.stderr.readline() == b"up\n"
        processes = [proxy.start("exec", "-i", "p", "--", "sha256sum") for _ in range(3)]
        for process in processes:
            with process:
                out, _ = process.communicate(data, timeout=50)
            assert out[:64].decode() == hashlib.sha256(data).hexdigest()
        noisy.terminate()
        noisy.communicate(timeout=20)


@contextlib.contextmanager
def pod_like_hyperstart(proxy: Proxy, directory: Path, name: str) -> Iterator[None]:
    """A pod whose agent loses what hyperstart loses."""
    ctl, io_path = str(directory / "ctl"), str(directory / "io")
    with proxy.start("agent", "--ctl", ctl, "--io", io_path) as agent:
        assert agent.stderr
        assert b"listens" in agent.stderr.readline()
        with proxy.start("run", "--ctl", ctl, "--io", io_path, "--id", name, "--", *STAYS) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == b"up\n"
                yield
            finally:
                process.terminate()
                process.communicate(timeout=20)
                agent.communicate(timeout=20)


@pytest.mark.parametrize("floods", [False, True])
def test_stdin_arrives_whole_at_an_agent_like_hyperstart(
    proxy: Proxy, tmp_sock_dir: Path, tmp_path: Path, floods: bool
) -> None:
    # No more than a pipe holds: what comes while it is full is lost, and nobody can help that.
    data, copy = hashlib.shake_128(b"stdin").digest(60_000), tmp_path / "copy"
    with pod_like_hyperstart(proxy, tmp_sock_dir, "p"), contextlib.ExitStack() as stack:
        if floods:
            endless = ("exec", "p", "--", "sh", "-c", "echo up >&2; exec yes")
            noisy = stack.enter_context(proxy.start(*endless, stdout=subprocess.DEVNULL))
            stack.callback(noisy.terminate)
            assert noisy.stderr
            assert noisy.stderr.readline() == b"up\n"
        process = stack.enter_context(proxy.start("exec", "-i", "p", "--", "sh", "-c", f"cat >{copy}"))
        stack.callback(process.terminate)
        assert process.stdin
        process.stdin.write(data)
        process.stdin.close()
        # Its end is not reported while output floods.
        until(lambda: copy.exists() and copy.stat().st_size == len(data))
        assert copy.read_bytes() == data


def test_stdin_in_frames_of_8192_bytes_ends_with_shut_wr_while_output_flows(proxy: Proxy) -> None:
    data = hashlib.shake_128(b"frames").digest(MIB)
    with proxy.pod("p"), Client(proxy.socket_path, timeout=20) as client:
        client.attach("p")
        io_base, fd = client.allocate_io(2)
        process = {"terminal": False, "stdio": io_base, "stderr": io_base + 1, "args": ["sha256sum"]}
        client.hyper("execcmd", {"container": "p", "process": process | {"envs": [], "workdir": "/"}})
        with socket.socket(fileno=fd) as stream:
            stream.settimeout(30)
            for start in range(0, MIB, 8_180):
                stream.sendall(encode_frame(io_base, data[start : start + 8_180]))
            stream.shutdown(socket.SHUT_WR)
            frames = read_to_exit(stream, io_base)
    out = b"".join(payload for seq, payload in frames[:-2])
    assert out[:64].decode() == hashlib.sha256(data).hexdigest()
    assert frames[-2:] == [(io_base, b""), (io_base, b"\0")]


def test_output_arrives_whole_from_two_vms_at_once(proxy: Proxy) -> None:
    command = ("run", "--local", "--", "sh", "-c", f"seq 1 2000000 | head -c {8 * MIB}")
    expected = hashlib.sha256(b"".join(b"%d\n" % n for n in range(1, 1_300_000))[: 8 * MIB]).hexdigest()
    for process in [proxy.start(*command) for _ in range(2)]:
        with process:
            out, err = process.communicate(timeout=50)
        assert (process.returncode, err) == (0, b"")
        assert hashlib.sha256(out).hexdigest() == expected


def test_two_processes_in_one_pod_and_a_signal(proxy: Proxy) -> None:
    with proxy.pod("p"):
        assert proxy.run("exec", "p", "--", "echo", "second") == (0, b"second\n", b"")
        with proxy.start("exec", "-i", "p", "--", "cat") as cat:
            out, _ = cat.communicate(b"third", timeout=20)
            assert (cat.returncode, out) == (0, b"third")


def readmes_program(socket_path: str) -> str:
    program: str
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return program.replace("/run/cc-oci-runtime/proxy.sock", socket_path)


def test_the_readmes_program(proxy: Proxy) -> None:
    printed = io.StringIO()
    with proxy.pod("web"), contextlib.redirect_stdout(printed):
        exec(readmes_program(proxy.socket_path), {})
    assert "payload=b'Linux\\n'" in printed.getvalue()
    assert "payload=b'\\x00'" in printed.getvalue()


def test_the_readmes_program_ends_with_its_vm(tmp_sock_dir: Path) -> None:
    def dies(process: FakeProcess) -> None:
        process.out(b"Linux\n")
        process.io.shutdown(socket.SHUT_RDWR)

    with FakeProxy(tmp_sock_dir / "proxy.sock", dies) as fake, pytest.raises(SystemExit, match="has gone"):
        exec(readmes_program(fake.path), {})


def read_to_exit(stream: socket.socket, io_base: int) -> list[Frame]:
    parser = FrameParser()
    frames: list[Frame] = []
    while len(frames) < 2 or frames[-2] != (io_base, b""):
        data = stream.recv(65_536)
        assert data
        frames += parser.receive_data(data)
    return frames
