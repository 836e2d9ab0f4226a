"""Commands that are sent to the agent while a process runs. Nobody waits for their answers."""

import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress

import msgspec

from cc_proxy.api import Client, Hyper, Request
from cc_proxy.api.messages import encode
from cc_proxy.ctl.relay import NOTHING, Wanted
from cc_proxy.ctl.signals import Signals

_READ_SIZE = 64 * 1024


class BackgroundCommands:
    """Pipelines `hyper` commands over the connection of an attached client.

    The answers are read and dropped, as the shim in the field does: a window that could not be resized is no
    reason to stop, and a container that cannot be killed has just ended. From now on the client must make no
    requests of its own.
    """

    def __init__(self, client: Client) -> None:
        self._sock: socket.socket | None = socket.socket(fileno=os.dup(client.fileno()))
        #: What is left of the command that is being sent.
        self._outgoing = b""
        #: Commands that wait to be sent, by the signal that caused them.
        self._waiting: dict[int, bytes] = {}

    def close(self) -> None:
        """Close this side's handle of the connection; the client keeps its own."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def send(self, signum: int, name: str, arguments: msgspec.Struct) -> None:
        """Send a command because of a signal, as soon as the connection takes it.

        It replaces an earlier command for the same signal that still waits, as a pending signal absorbs
        further ones.
        """
        payload = Hyper(name, msgspec.Raw(msgspec.json.encode(arguments)))
        self._waiting[signum] = encode(Request(payload.NAME, msgspec.Raw(msgspec.json.encode(payload))))

    def wants(self) -> Wanted:
        """Always read answers; write while there is something to send."""
        if self._sock is None:
            return NOTHING
        sending = select.POLLOUT if self._outgoing or self._waiting else 0
        return self._sock.fileno(), select.POLLIN | sending

    def handle(self, events: int) -> None:
        """Send, and drop what arrives. A lost connection is only closed: the I/O fd tells why it was lost."""
        assert self._sock is not None
        try:
            if events & select.POLLOUT:
                self._send(self._sock)
            if events & ~select.POLLOUT:
                self._receive(self._sock)
        except ConnectionError:
            self.close()

    def _send(self, sock: socket.socket) -> None:
        if not self._outgoing:
            self._outgoing = self._waiting.pop(next(iter(self._waiting)))
        with suppress(BlockingIOError):
            sent = sock.send(self._outgoing, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self._outgoing = self._outgoing[sent:]

    def _receive(self, sock: socket.socket) -> None:
        with suppress(BlockingIOError):
            if not sock.recv(_READ_SIZE, socket.MSG_DONTWAIT):
                self.close()


class SignalWatch:
    """Calls `react` for each signal that arrives."""

    def __init__(self, signals: Signals, react: Callable[[int], None]) -> None:
        self._signals = signals
        self._react = react

    def wants(self) -> Wanted:
        """Always watch for signals."""
        return self._signals.fileno(), select.POLLIN

    def handle(self, _events: int) -> None:
        """React to the signals that have arrived."""
        for signum in self._signals.take():
            self._react(signum)
