"""A user who starves all that runs with their uid: the habit `starve` of `bench.attack`.

Hellos name a socket that accepts no connections, so that a part of the daemon waits for it under the user's
uid. The user gives that part the lowest priority, on a CPU that is kept busy.
"""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from bench.launch import ends_with
from cc_proxy.api import Client, ProxyError

HABIT = "starve"

HELLOS = 40
_BUSY = 8
_CPU = 0
_INTERVAL = 0.01
#: Seconds after which the socket is replaced.
_ROUND = 0.5


def keep_busy(uid: int) -> set[int]:
    """Fork processes that only burn CPU, with normal priority, and end with this one; returns their pids."""
    parent, busy = os.getpid(), set()
    for _ in range(_BUSY):
        busy.add(pid := os.fork())
        if not pid:
            os.setresuid(uid, uid, uid)
            os.sched_setaffinity(0, [_CPU])
            if ends_with(parent):
                while True:
                    pass
    return busy


def attack(path: str, directory: str, busy: set[int]) -> None:
    full = f"{directory}/full"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(full)  # of an attack that was killed
    for number in range(HELLOS):
        threading.Thread(target=_say_hello, args=(path, number, full), daemon=True).start()
    while True:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(full)
            listener.listen(0)
            first.connect(full)
            until = time.monotonic() + _ROUND
            while time.monotonic() < until:
                _starve_others(busy | {os.getpid()})
                time.sleep(_INTERVAL)
        os.unlink(full)  # everything that has waited goes on at once


def _say_hello(path: str, number: int, full: str) -> None:
    while True:
        with contextlib.suppress(OSError, ProxyError), Client(path) as client:
            client.hello(f"starving-{number}", full, full)


def _starve_others(ours: set[int]) -> None:
    """Take the CPU from all other threads on this host, as far as the kernel lets this user."""
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        if int(task.parts[2]) not in ours:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(task.name), [_CPU])
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
