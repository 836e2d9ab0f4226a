"""A channel whose process is killed under load: what clients and the VM get is right, and goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.continuity.memory import BUFFER_SIZE
from tests.proxy.streams.load import Load
from tests.wire.support import WAIT, wait_until

End = tuple[str, int, bool]


class Driver:
    """A process that drives the channel (`killed`), with memory of its own."""

    def __init__(self, load: Load, before: Driver | None, stack: ExitStack) -> None:
        """It imports what it needs at once, but waits for `go` then."""
        self._load = load
        self._before = before
        self.memory = [os.memfd_create("buffers"), os.memfd_create("cells")]
        for fd, size in zip(self.memory, (2 * BUFFER_SIZE, 64 * 1024), strict=True):
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
        fds = [load.vm.theirs.fileno(), *(client.theirs.fileno() for client in load.clients)]
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.proxy.streams.killed"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[*fds, *self.memory, *(before.memory if before else ())],
            )
        )
        stack.callback(self.process.kill)
        self.hung_up: dict[int, str] = before.hung_up if before else {}

    def go(self, directory: Path, window: int, ends: tuple[End | None, End | None]) -> dict[str, Any]:
        """Have it go on where the one before was; returns what it says of that."""
        fds = {client.seq: client.theirs.fileno() for client in self._load.clients}
        order = {
            "directory": str(directory),
            "io": self._load.vm.theirs.fileno(),
            "sessions": [(seq, -1 if seq in self.hung_up else fd) for seq, fd in fds.items()],
            "next_seq": 1 + 2 * len(fds),
            "window": window,
            "memory": self.memory,
            "before": self._before.memory if self._before else None,
            "ends": ends,
        }
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        for seq, reason in said.get("hung_up", ()):
            self.hung_up[seq] = reason
            self._load.hang_up(seq)
        return said


class Story:
    """One process after the other, and what each of them says is missing."""

    def __init__(self, load: Load, processes: int, directory: Path, window: int, stack: ExitStack) -> None:
        self.load = load
        self._directory, self._window = directory, window
        self._drivers: list[Driver] = []
        for _ in range(processes):
            self._drivers.append(Driver(load, self._drivers[-1] if self._drivers else None, stack))
        self._left = iter(self._drivers)
        self.gaps: list[tuple[bool, list[int], int]] = []
        self.hung_up = self._drivers[0].hung_up
        self.resyncs = 0

    def go_on(self, at_vm: End | None = None, at_client: End | None = None) -> subprocess.Popen[bytes]:
        driver = next(self._left)
        said = driver.go(self._directory, self._window, (at_vm, at_client))
        if driver is self._drivers[0]:
            self.load.start()
        else:
            assert not said["lost"]
            self.gaps += said["gaps"]
            self.resyncs += said["resync"]
        return driver.process

    def check(self) -> None:
        kills = len(self._drivers) - 1
        vm = self.load.vm
        assert not vm.wrong
        for client in self.load.clients:
            assert not client.wrong
            assert all(count <= kills for count in client.gaps.values())
            assert client.lost <= self._most(client.seq, to_vm=False)
            assert vm.lost[client.seq] <= self._most(client.seq, to_vm=True)

    def _most(self, seq: int, *, to_vm: bool) -> int:
        return sum(most for way, streams, most in self.gaps if way == to_vm and seq in (streams or [seq]))


def wait_for_more(story: Story) -> None:
    """Everybody gets output again."""
    clients = [client for client in story.load.clients if client.seq not in story.hung_up]
    before = {client: client.frames for client in clients}
    wait_until(lambda: all(client.frames > before[client] for client in clients), "output goes on")


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("method", ["recv_into", "send"])
@pytest.mark.parametrize("at", ["vm", "client"])
@pytest.mark.parametrize("pause", [0.0, 0.001], ids=["flood", "drops"])
def test_killed_at(tmp_path: Path, at: str, method: str, is_done: bool, pause: float) -> None:
    with ExitStack() as stack:
        load = stack.enter_context(Load(3, 3_000 if pause == 0.0 else 30, pause))
        story = Story(load, 2, tmp_path, 0, stack)
        end = (method, 40, is_done)
        killed = story.go_on(*((end, None) if at == "vm" else (None, end)))
        assert killed.wait(WAIT) == -signal.SIGKILL
        story.go_on()
        wait_for_more(story)
    story.check()
    in_doubt = method == "recv_into" and at == "vm"
    # What was read last before may happen to have been little, in a flood too.
    assert story.resyncs in ((in_doubt,) if pause > 0.0 else (False, in_doubt))
    # A client that is slow in a flood may just have been sent a part of a frame from its spool.
    torn = {"its client may have a part of a frame"}
    assert set(story.hung_up.values()) <= (set() if pause > 0.0 else torn)


@pytest.mark.parametrize("window", [0, 512])
def test_killed_at_any_time(tmp_path: Path, window: int) -> None:
    _kill_at_random(tmp_path, window, 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again(tmp_path: Path, window: int, seed: int) -> None:
    _kill_at_random(tmp_path, window, 20, seed)


def _kill_at_random(directory: Path, window: int, kills: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        load = stack.enter_context(Load(4, rng.choice([40, 500, 9_000]), 0.0))
        story = Story(load, kills + 1, directory, window, stack)
        for _ in range(kills):
            process = story.go_on()
            time.sleep(rng.uniform(0.0, 0.2))
            process.kill()
            process.wait(WAIT)
        story.go_on()
        wait_for_more(story)
    story.check()
    print("gaps", story.gaps, "hung up", story.hung_up, "resyncs", story.resyncs)
