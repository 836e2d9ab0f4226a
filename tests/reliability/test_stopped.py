"""A daemon that is stopped for longer than it waits for anything, and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.wire.daemon import Daemon, Wire
from tests.wire.support import (
    ACK,
    NEXT,
    OK,
    PING,
    READY,
    VERSIONED,
    command,
    frame,
    refused,
    request,
)

# The longest of these, and a bit.
STOPPED = 1.3
# Longer than all that is waited for by default, commands included.
A_MINUTE = 65.0
IMPATIENT = """
[vm]
ready_timeout = 1.0
ready_ping_after = 0.9
command_timeout = 1.0
[stdin]
echo_timeout = 0.1
[limits]
message_timeout = 1.0
"""


@contextmanager
def stopped(daemon: Daemon, seconds: float = STOPPED) -> Iterator[None]:
    """For as long as it says, however long what happens meanwhile takes."""
    os.kill(daemon.pid, signal.SIGSTOP)
    goes_on_at = time.monotonic() + seconds
    try:
        yield
        time.sleep(max(0.0, goes_on_at - time.monotonic()))
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_what_came_in_time_counts_though_the_daemon_was_stopped(tmp_sock_dir: Path) -> None:
    """No VM is lost, no client let go and no command given up because of what only the daemon missed."""
    with Daemon.configured(tmp_sock_dir, IMPATIENT) as daemon, closing(Wire(daemon, tmp_sock_dir)) as wire:
        pod = wire.pod()
        stream = pod.open(1)
        pinger, talker, starter = wire.attached(pod), wire.client(), wire.client()
        booting = wire.vm()
        starter.hello("booting", booting)
        booting.accept()
        whole = request("x", "x" * 150_000)  # more than is read at once
        talker.send(whole[:10])
        pinger.hyper("ping")
        taken = pod.vm.read_command()
        with stopped(daemon):
            stream.send(b"typed")
            booting.say(READY)
            pod.vm.ctl.sendall(command(NEXT, bytes(4)) * 500 + command(ACK))  # and so is this
            pod.vm.send_frame(stream.base, b"out")
            talker.send(whole[10:])
        assert taken.code == PING
        assert pinger.receive() == OK
        assert talker.receive() == refused("no payload named 'x'")
        assert starter.receive() == VERSIONED
        assert pod.vm.io.recv(100) == frame(stream.base, b"typed")
        assert stream.read_frame().payload == b"out"
        assert pod.pings()
        assert wire.is_registered("booting")
        assert "VM lost" not in daemon.log()
        wire.close()
        daemon.check()
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_stopped_for_a_minute(tmp_sock_dir: Path) -> None:
    """With the settings that it has by default: longer than all of them."""
    with Daemon.configured(tmp_sock_dir, "[vm]\n") as daemon, closing(Wire(daemon, tmp_sock_dir)) as wire:
        pods = [wire.pod() for _ in range(5)]
        streams = [pod.open(1) for pod in pods]
        for pod in pods:
            pod.client.hyper("ping")
            pod.vm.read_command()
        with stopped(daemon, A_MINUTE):
            for pod, stream in zip(pods, streams, strict=True):
                pod.vm.ctl.sendall(command(ACK))
                pod.vm.send_frame(stream.base, b"out")
                stream.send(b"typed")
        for pod, stream in zip(pods, streams, strict=True):
            assert pod.client.receive() == OK
            assert stream.read_frame().payload == b"out"
            assert pod.vm.next_frame() == (stream.base, b"typed")
            assert pod.pings()
        assert "VM lost" not in daemon.log()
        wire.close()
        daemon.check()
        assert daemon.stop() == 0
