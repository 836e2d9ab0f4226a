"""Commands that are sent while a process runs, over a connection that takes no more for a while."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from cc_proxy.api import Client, Request, Response, read_message, write_message
from cc_proxy.ctl.background import BackgroundCommands
from cc_proxy.ctl.relay import loop
from cc_proxy.ctl.requests import KillContainer, WinSize


class FullConnection:
    """Commands whose connection is full, and the other end of it."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.client = Client(near)
        self.commands = BackgroundCommands(self.client)
        self.sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sent += near.send(bytes(1024), socket.MSG_DONTWAIT)

    def __enter__(self) -> FullConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.commands.close()
        self.client.close()
        self.far.close()

    def drain(self) -> None:
        assert len(self.far.recv(self.sent, socket.MSG_WAITALL)) == self.sent

    def asked(self) -> list[Request]:
        """Have all that waits sent, and return it."""
        loop((self.commands,), lambda: not self.commands.wants()[1] & select.POLLOUT)
        self.far.shutdown(socket.SHUT_WR)
        self.client.close()
        self.commands.close()
        return list(iter(lambda: read_message(self.far, Request, timeout=10), None))


@pytest.fixture
def full() -> Iterator[FullConnection]:
    with FullConnection() as full:
        yield full


def test_answers_are_taken_while_nothing_can_be_sent(full: FullConnection) -> None:
    full.commands.send(signal.SIGWINCH, "winsize", WinSize(1, 24, 80))
    write_message(full.far, Response(True))
    fd, events = full.commands.wants()
    poll = select.poll()
    poll.register(fd, events)
    [(_, came)] = poll.poll(10_000)
    full.commands.handle(came)
    assert poll.poll(0) == []  # else whoever waits for it spins


def test_of_window_sizes_only_the_last_is_sent(full: FullConnection) -> None:
    full.commands.send(signal.SIGTERM, "killcontainer", KillContainer("pod", signal.SIGTERM))
    for rows in range(2000):
        full.commands.send(signal.SIGWINCH, "winsize", WinSize(1, rows, 80))
    full.commands.send(signal.SIGINT, "killcontainer", KillContainer("pod", signal.SIGINT))
    full.drain()
    assert [bytes(request.data) for request in full.asked()] == [  # type: ignore[arg-type]  # there is data
        b'{"hyperName":"killcontainer","data":{"container":"pod","signal":15}}',
        b'{"hyperName":"winsize","data":{"seq":1,"row":1999,"column":80}}',
        b'{"hyperName":"killcontainer","data":{"container":"pod","signal":2}}',
    ]
