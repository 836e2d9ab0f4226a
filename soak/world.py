"""Many VMs and their clients in one process: `python -m soak.world DIRECTORY NAME`."""

import gc
import random
import select
import sys
import time
from collections import Counter
from typing import Any

from bench.worker import serve
from soak.pod import Pod

#: Seconds between two turns.
_TURN = 0.01


class World:
    """The public methods are orders (`bench.worker`)."""

    def __init__(self, directory: str, name: str) -> None:
        self._directory = directory
        self._name = name
        self._number = 0

    def run(self, proxy: str, vms: int, seconds: float, seed: int) -> dict[str, Any]:
        """Keep this many VMs alive for `seconds`, then let all of them end regularly.

        Returns what was done, and its course: once per second the time (`time.monotonic`), the bytes that
        had arrived, and the VMs that had died.
        """
        gc.enable()
        done: Counter[str] = Counter()
        dice = random.Random(seed)
        pods: list[Pod] = []
        end = time.monotonic() + seconds
        course: list[tuple[float, int, int]] = []
        before = time.monotonic()
        try:
            while (now := time.monotonic()) < end or pods:
                if now < end and len(pods) < vms:
                    pods.append(self._pod(proxy, dice, done))
                for pod in pods:
                    if now >= end:
                        pod.end()
                    pod.turn(now, now - before)
                pods = [pod for pod in pods if not pod.over]
                if not course or now - course[-1][0] >= 1:
                    course.append((now, done["bytes"], done["VMs that died"]))
                before = now
                _serve(pods, now + _TURN)
        finally:
            for pod in pods:
                pod.close()
        return {"done": done, "course": course}

    def _pod(self, proxy: str, dice: random.Random, done: Counter[str]) -> Pod:
        self._number += 1
        return Pod(self._directory, proxy, self._name, self._number, dice, done)


def _serve(pods: list[Pod], until: float) -> None:
    """Let each VM take stdin at once, because the daemon waits for the markers that come back."""
    by_fd = {pod.fileno(): pod for pod in pods if pod.fileno() >= 0}
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            by_fd[fd].serve()


if __name__ == "__main__":
    serve(World(*sys.argv[1:]))
