"""A user who wants all of a daemon: `python -m bench.attack SOCKET UID HABIT CONNECTIONS DIRECTORY`.

It runs until it is killed. Some habits need VMs (`bench.hostile_vms`), whose sockets go into the directory.
`bench.hostile` measures what an attack costs other users.
"""

import os
import select
import socket
import sys
from contextlib import suppress

import msgspec

from bench import hostile_vms, starving
from bench.launch import ends_with
from cc_proxy.api import Attach, Hello, Request
from cc_proxy.api.messages import HEADER, MAX_TEXT, encode

_READ_SIZE = 64 * 1024
#: Requests that are sent at once, few enough to fit into a socket's buffer; and connections per turn.
_ROUND = 64


def _raw(text: bytes) -> bytes:
    return HEADER.pack(len(text), 0) + text


def _request(payload: Attach | Hello) -> bytes:
    return encode(Request(payload.NAME, msgspec.Raw(msgspec.json.encode(payload))))


_ATTACH = _request(Attach("nobody's"))
_HELLO = _request(Hello("mine", "/dev/null/ctl", "/dev/null/io"))
_LONG = _raw(b'{"id":"' + b"x" * (MAX_TEXT - 9) + b'"}')
_DEEP = _raw(b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}")

#: What is sent on each connection, over and over.
HABITS: dict[str, bytes] = {
    "flood": _ATTACH * _ROUND,
    "halves": _ATTACH[:-7],
    "hellos": _HELLO * _ROUND,
    "long": _LONG,
    "deep": _DEEP,
    "nonsense": _raw(b"{}") + bytes(7) + b"x",
    "churn": _ATTACH,
    "dribble": _LONG,
}
#: Habits that send it only once on each connection, and those of them that then hang up.
_ONCE = frozenset({"halves", "nonsense", "churn"})
_HANGS_UP = frozenset({"churn"})
#: Bytes that are sent at once, where it is not everything.
_PIECE = {"dribble": 1}


class Attacker:
    """One connection, which connects again whenever the daemon closes it."""

    def __init__(self, path: str, habit: str, epoll: select.epoll) -> None:
        self._path = path
        self._said = HABITS[habit]
        self._once = habit in _ONCE
        self._hangs_up = habit in _HANGS_UP
        self._piece = _PIECE.get(habit, len(self._said))
        self._epoll = epoll
        self._left = memoryview(b"")
        self.sock: socket.socket | None = None

    def connect(self) -> bool:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:  # the daemon's backlog is full, or this process is out of fds
            sock.close()
            return False
        self.sock = sock
        self._left = memoryview(self._said)
        self._epoll.register(sock, select.EPOLLIN | select.EPOLLOUT)
        return True

    def go_on(self, events: int) -> bool:
        """Send and receive what is possible; returns False if the connection is over."""
        assert self.sock
        try:
            if events & select.EPOLLIN and (not self.sock.recv(_READ_SIZE) or self._hangs_up):
                return False
            if events & select.EPOLLOUT:
                self._send()
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _send(self) -> None:
        assert self.sock
        self._left = self._left[self.sock.send(self._left[: self._piece]) :]
        if not self._left:
            if self._once:
                self._epoll.modify(self.sock, select.EPOLLIN)
            else:
                self._left = memoryview(self._said)

    def hang_up(self) -> None:
        if self.sock:
            self.sock.close()
            self.sock = None


def attack(path: str, habit: str, connections: int) -> None:
    """Keep `connections` connections busy with a habit; if it is `all`, they take all habits in turn."""
    epoll = select.epoll()
    names = list(HABITS) if habit == "all" else [habit]
    idle = [Attacker(path, names[number % len(names)], epoll) for number in range(connections)]
    busy: dict[int, Attacker] = {}
    while True:
        for attacker in idle[:_ROUND]:
            if not attacker.connect():
                break
            idle.remove(attacker)
            assert attacker.sock
            busy[attacker.sock.fileno()] = attacker
        for fd, events in epoll.poll(0.05 if idle else 1):
            if not busy[fd].go_on(events):
                attacker = busy.pop(fd)
                attacker.hang_up()
                idle.append(attacker)


def main(path: str, uid: int, habit: str, connections: int, directory: str) -> None:
    parent = os.getppid()
    busy = starving.keep_busy(uid) if habit == starving.HABIT else set()
    # The benchmark measures the daemon, and not how the host divides its CPUs among users.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if not ends_with(parent):
        return
    with suppress(KeyboardInterrupt):
        if habit in hostile_vms.HABITS:
            hostile_vms.attack(path, directory, habit)
        elif habit == starving.HABIT:
            starving.attack(path, directory, busy)
        else:
            attack(path, habit, connections)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
