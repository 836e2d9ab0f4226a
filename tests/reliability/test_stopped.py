"""A daemon that is stopped for longer than it waits for anything, and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

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
def stopped(daemon: Daemon) -> Iterator[None]:
    """For as long as it says, however long what happens meanwhile takes."""
    os.kill(daemon.pid, signal.SIGSTOP)
    goes_on_at = time.monotonic() + STOPPED
    try:
        yield
        time.sleep(max(0.0, goes_on_at - time.monotonic()))
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_what_came_in_time_counts_though_the_daemon_was_stopped(tmp_sock_dir: Path) -> None:
    """No VM is lost, no client let go and no command given up because of what only the daemon missed."""
    with Daemon.configured(tmp_sock_dir, IMPATIENT) as daemon, closing(Wire(daemon, tmp_sock_dir)) as wire:
        pod = wire.pod()
        stream = pod.client.allocate(1)
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
