"""The clock of the day jumps, by days and both ways, each time anybody looks at it."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path

from tests.wire.daemon import HASTY, Daemon, Wire
from tests.wire.support import ACK, PING, command, error_of, frame

#: What HASTY has of them, in seconds.
COMMAND_TIMEOUT, BYE_LINGER = 0.5, 0.4
#: Not more than this on top, however busy the machine is; much less than the smallest jump.
SLACK = 8.0
#: Runs the module that the command line behind it names.
JUMPING = """
import itertools, runpy, sys, time
days = itertools.cycle((0, 90_000, -90_000, 40_000_000, -400_000, 5))
right, right_ns = time.time, time.time_ns
time.time = lambda: right() + next(days)
time.time_ns = lambda: right_ns() + next(days) * 10**9
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_no_deadline_is_the_clocks(tmp_sock_dir: Path) -> None:
    """What takes its time takes that time, and what is in time is in time. Only the log shows the jumps."""
    prefix = [sys.executable, "-c", JUMPING]
    with (
        Daemon.configured(tmp_sock_dir, HASTY, prefix=prefix) as daemon,
        closing(Wire(daemon, tmp_sock_dir)) as wire,
    ):
        pod = wire.pod()
        stream = pod.open(1)
        assert pod.pings()
        stream.send(bytes(300))
        assert pod.vm.read_frame() == (stream.base, bytes(300))
        first, again = pod.vm.read_frame(), pod.vm.read_frame()  # nobody sends the first marker back
        assert first.seq == again.seq
        pod.vm.send_frame(again.seq)
        stream.send(b"after")
        assert pod.vm.next_frame().payload == b"after"
        begun = time.monotonic()
        pod.client.hyper("ping")
        assert pod.vm.read_command().code == PING
        assert error_of(pod.client.receive()).startswith("no answer from the VM in ")
        assert COMMAND_TIMEOUT <= time.monotonic() - begun < COMMAND_TIMEOUT + SLACK
        pod.vm.ctl.sendall(command(ACK))
        assert pod.pings()
        begun = time.monotonic()
        pod.client.bye(pod.container)
        pod.vm.io.sendall(frame(stream.base, b"last"))
        assert stream.read_frame().payload == b"last"
        assert stream.at_end()
        assert BYE_LINGER <= time.monotonic() - begun < BYE_LINGER + SLACK
        wire.close()
        daemon.check()
        assert daemon.stop() == 0
        times = [json.loads(line)["timestamp"] for line in daemon.log().splitlines()]
        assert times != sorted(times)
