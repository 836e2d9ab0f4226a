"""A server that runs in this process, and its clients."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cc_proxy.api import messages
from cc_proxy.continuity.state.clients import ServerState
from cc_proxy.proxy.clients import server as server_module
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers, Reply
from cc_proxy.proxy.clients.listener import Listener
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.users import Thing
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import Limits, LiveSettings, Settings
from tests.connector import CONNECTOR
from tests.wire.support import WAIT, RawClient, refused

UNKNOWN = refused("no payload named 'x'")
DEFAULT_LIMITS = Limits()


class House:
    """A server that runs, and clients of it."""

    def __init__(
        self,
        directory: Path,
        limits: Limits = DEFAULT_LIMITS,
        *,
        own: bool = True,
        state: ServerState | None = None,
    ) -> None:
        self.path = directory / "sock"
        self._stack = ExitStack()
        if own:
            listener = Listener.bind(str(self.path))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(self.path))
            sock.listen()
            self.kept = sock.dup()
            self._stack.callback(self.kept.close)
            listener = Listener(sock)
        self._listener = listener
        live = LiveSettings(Settings(limits=limits))
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(server_module, "_STOP_POLL", 0.01)
        self._stack.callback(self._patch.undo)
        self._stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        self.registry = Registry(live, CONNECTOR)
        self.server = Server(listener, self.registry, live)
        if state:
            self.server.restore(state, [])
        self.server.start()
        self._stopped = False

    def connect(self) -> RawClient:
        client = RawClient(self.path)
        self._stack.callback(client.close)
        return client

    def has(self, thing: Thing) -> int:
        """How much of something this process's user has."""
        return self.registry.users.of(os.geteuid()).has[thing]

    def stop(self, seconds: float = WAIT) -> bool:
        self._stopped = True
        self.server.stop_accepting()
        try:
            return self.server.roster.wait_until_empty(seconds)
        finally:
            self.server.roster.shut_down(socket.SHUT_RDWR)
            self.server.server_close()

    def close(self) -> None:
        self._stack.close()
        if not self._stopped:
            self.stop()
        self._listener.remove()


@contextmanager
def limited(directory: Path, limits: Limits) -> Iterator[House]:
    house = House(directory, limits)
    try:
        yield house
    finally:
        house.close()


#: More than a socket takes at once.
LONG = b"x" * 1_000_000


class Answering:
    """Handlers whose answers a test chooses by what it asks: `wait`, `long`, `fd`, `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clients: list[int] = []  # by number, once for each request
        self.asker: ClientInfo | None = None  # the last one
        self.passed: list[socket.socket] = []
        self.proceed = threading.Event()
        monkeypatch.setattr(Handlers, "answer", lambda handlers, client, text: self.answer(client, text))
        monkeypatch.setattr(
            Handlers, "answer_at_once", lambda handlers, client, text: self.at_once(client, text)
        )

    def at_once(self, client: ClientInfo, text: bytes) -> Reply | None:
        return None if b"wait" in text else self.answer(client, text)

    def answer(self, client: ClientInfo, text: bytes) -> Reply:
        self.asker = client
        self.clients.append(client.number)
        if b"wait" in text:
            assert self.proceed.wait(WAIT)
        if text == b"error":
            raise KeyError("nobody expects it")
        answer = LONG if b"long" in text else b"here it is" if text == b"fd" else b"answer"
        if not text.endswith(b"fd"):
            return Reply(messages.frame_text(answer))
        near, far = socket.socketpair()
        near.close()
        self.passed.append(far)
        return Reply(messages.frame_text(answer), far)
