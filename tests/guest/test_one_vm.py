"""What goes through a real hypervisor, virtio-serial ports and a kernel: one VM, one test after the other."""

from __future__ import annotations

import os
import signal
import socket
import termios
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cc_proxy.api import Client, Frame, FrameParser, Hyper, Refused
from tests.ctl.running import read_until
from tests.ctl.vm.processes import wait_until
from tests.ctl.window import Window
from tests.guest.stage import MIB, Stage, monitor, random_bytes

pytestmark = [pytest.mark.guest, pytest.mark.timeout(200)]


def process(io_base: int, *args: str) -> dict[str, object]:
    streams = {"terminal": False, "stdio": io_base, "stderr": io_base + 1}
    return {"container": "web", "process": streams | {"args": args, "workdir": "/", "envs": []}}


def read_to_exit(stream: socket.socket, io_base: int) -> list[Frame]:
    parser, frames = FrameParser(), list[Frame]()
    while len(frames) < 2 or frames[-2] != (io_base, b""):
        data = stream.recv(65_536)
        assert data
        frames += parser.receive_data(data)
    return frames


def test_the_wire(stage: Stage, web: str) -> None:
    with Client(stage.path, timeout=100) as client:
        client.attach(web)
        io_base, fd = client.allocate_io(2)
        with socket.socket(fileno=fd) as stream:
            stream.settimeout(100)
            client.hyper("execcmd", process(io_base, "/bin/sh", "-c", "echo out; echo err >&2; exit 7"))
            frames = read_to_exit(stream, io_base)
        assert b"".join(payload for seq, payload in frames[:-2] if seq == io_base) == b"out\n"
        assert b"".join(payload for seq, payload in frames[:-2] if seq == io_base + 1) == b"err\n"
        assert frames[-2:] == [(io_base, b""), (io_base, b"\x07")]
        for name, data in (("startpod", {}), ("winsize", {"seq": "x"}), ("execcmd", process(99, "/no/such"))):
            with pytest.raises(Refused, match="ERROR received from Hyperstart"):
                client.hyper(name, data)
        with pytest.raises(Refused, match="message too long 10249"):
            client.hyper("ping", b'"' + b"x" * 10239 + b'"')
        client.request(Hyper("ping"))


def test_a_terminal(stage: Stage, web: str, window: Window) -> None:
    shell = (
        "stty size; trap 'stty size' WINCH; echo ready; while read -r line; do echo \"<$line>\"; done; exit 3"
    )
    with window.start(stage.path, "exec", "-ti", web, "--", "sh", "-c", shell) as child:
        assert read_until(window.user, b"ready\r\n") == b"24 80\r\nready\r\n"
        os.write(window.user, b"typed\r")
        assert read_until(window.user, b"<typed>\r\n") == b"typed\r\n<typed>\r\n"
        termios.tcsetwinsize(window.terminal, (30, 100))
        os.killpg(child.pid, signal.SIGWINCH)
        read_until(window.user, b"30 100\r\n")
        os.write(window.user, b"\x04")
        assert child.wait() == 3


def test_10_mib_of_stdin(stage: Stage, web: str) -> None:
    data, digest = random_bytes(10 * MIB)
    output, errors, status = stage.run("exec", "-i", web, "--", "sha256sum", stdin=data)
    assert (output.split()[0].decode(), errors, status) == (digest, b"", 0)


def test_16_sessions_at_once(stage: Stage, web: str) -> None:
    data, digest = random_bytes(128 * 1024)
    shell = "sha256sum; seq 1 20000; echo err >&2"
    lines = b"".join(b"%d\n" % number for number in range(1, 20_001))
    children = [stage.start("exec", "-i", web, "--", "sh", "-c", shell) for _ in range(16)]
    with ThreadPoolExecutor(len(children)) as pool:
        outcomes = list(pool.map(lambda child: child.communicate(data), children))
    assert outcomes == [(f"{digest}  -\n".encode() + lines, b"err\n")] * 16
    assert [child.returncode for child in children] == [0] * 16


def test_a_vm_that_is_stopped_in_the_middle_of_stdin(stage: Stage, web: str) -> None:
    data, digest = random_bytes(2 * MIB)
    with stage.start("exec", "-i", web, "--", "sha256sum") as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(data[:MIB])
        monitor(web, "stop")
        done = threading.Event()

        def write_the_rest() -> None:
            assert child.stdin
            child.stdin.write(data[MIB:])
            child.stdin.close()
            done.set()

        thread = threading.Thread(target=write_the_rest)
        thread.start()
        assert not done.wait(1.5)  # somebody would have to take it
        assert stage.run("status")[2] == 0  # and nobody else waits
        monitor(web, "cont")
        thread.join()
        assert child.stdout.read().split()[0].decode() == digest
        assert child.wait() == 0


def test_one_that_fills_its_memory(stage: Stage, web: str) -> None:
    """The kernel kills what takes it, not the agent."""
    output, errors, _ = stage.run("exec", web, "--", "tail", "/dev/zero")
    assert (output, errors) == (b"", b"")
    assert stage.works(web)
    wait_until(lambda: "Out of memory: Killed process" in stage.daemon.log())


def test_the_console_is_in_the_log(stage: Stage, web: str) -> None:
    """From the beginning, also what was said before the VM was registered."""
    wait_until(lambda: '"line": "cc-proxy agent: serves its two ports"' in stage.daemon.log())
    assert stage.run("exec", web, "--", "sh", "-c", "echo said on the console > /dev/console")[2] == 0
    wait_until(lambda: '"line": "said on the console"' in stage.daemon.log())
