"""The request loop: the daemon's own, with its handlers, a registered VM, and clients that send anything.

Nothing may be raised, logged with a traceback or counted as a fault, and no line of the log broken. Each
request gets one response, whole and in order, until one that is no message; an fd follows where one is due.
"""

from __future__ import annotations

import json
import logging
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from msgspec.structs import replace

from cc_proxy.api import messages
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.fdpassing import read_fd
from cc_proxy.api.messages import MAX_RESPONSE, MemberError
from cc_proxy.api.payloads import Hello, Request
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log import faults
from cc_proxy.log.levels import CONSOLE, logger
from cc_proxy.log.writing import JsonLines, TextLines
from cc_proxy.proxy.clients.connection import After, Connection
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers
from cc_proxy.proxy.rest import Rest
from cc_proxy.proxy.vms.connector import Connector
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import LiveSettings, Settings, SpoolSettings, VmSettings
from tests.fuzz.acknowledging import AcknowledgingVm
from tests.fuzz.choices import Choices
from tests.fuzz.grammar import object_text, value_text
from tests.slow import message, texts_in

#: Of whatever is sent or answered so much waits in a socket, so that one thread can play both ends in turn.
_ROOM = 4 << 20
_LONGEST_STREAM = 100_000
_PAYLOADS = ("attach", "allocateIO", "hyper", "hello", "bye", "status", "logLevel", "nonsense", "")
_MEMBERS = ("containerId", "ctlSerial", "ioSerial", "console", "nStreams", "hyperName", "data", "level")
_COMMANDS = ("ping", "execcmd", "destroypod", "getversion", "ready", "nonsense", "")
_LEVELS = ("io", "error", "debug", "nonsense")
_IDS = ("vm", "other", "\n\x1b[31m", "é" * 600, "")
_WORDS = (*_PAYLOADS, *_MEMBERS, *_COMMANDS, *_LEVELS, *_IDS, "id", "data")


def run(choices: Choices) -> None:
    """Clients of one daemon, one after the other."""
    with _served() as (house, vm), _Log() as log:
        for number, stream in enumerate(choices.some(4, lambda: _stream(choices, vm)), 1):
            _client(house, number, stream, choices.cuts())
        log.check()


# What clients send --------------------------------------------------------------------------------------


def _stream(choices: Choices, vm: AcknowledgingVm) -> bytes:
    return b"".join(choices.some(30, lambda: _sent(choices, vm)))[:_LONGEST_STREAM]


def _sent(choices: Choices, vm: AcknowledgingVm) -> bytes:
    kind = choices.number(9)
    if kind == 9:
        return message(choices.payload(), choices.pick((0, 5, 1_048_577)), choices.pick((0, 0, 1)))
    if kind == 8:
        return message(value_text(choices, _WORDS))
    if kind == 7:
        return message(object_text(choices, _WORDS))
    name, arguments = choices.pick(_PAYLOADS), _arguments(choices, vm)
    return message(b'{"id":%s,"data":%s}' % (json.dumps(name).encode(), arguments))


def _arguments(choices: Choices, vm: AcknowledgingVm) -> bytes:
    """Of any payload: right but for what is left out, or anything."""
    if choices.number(4) == 4:
        return value_text(choices, _WORDS)
    members = {
        "containerId": choices.pick(_IDS),
        "ctlSerial": choices.pick((vm.control_path, vm.control_path, vm.io_path, "/nonexistent", "\0x")),
        "ioSerial": choices.pick((vm.io_path, vm.io_path, "/nonexistent", "relative", "x" * 200)),
        "nStreams": choices.pick((1, 2, 0, 2**70)),
        "hyperName": choices.pick(_COMMANDS),
        "level": choices.pick(_LEVELS),
        "data": choices.pick((None, {}, "x" * 10_300)),
    }
    return json.dumps({name: value for name, value in members.items() if choices.number(9) != 9}).encode()


# The daemon ---------------------------------------------------------------------------------------------


class _House(NamedTuple):
    """What a connection needs of a daemon."""

    handlers: Handlers
    registry: Registry
    live: LiveSettings


@contextmanager
def _served() -> Iterator[tuple[_House, AcknowledgingVm]]:
    """A daemon without a server, and a VM that it has registered."""
    with (
        tempfile.TemporaryDirectory(prefix="ccp-", dir="/tmp") as directory,
        AcknowledgingVm(directory) as vm,
        closing(Connector()) as connector,
    ):
        connector.start()
        settings = Settings(spool=SpoolSettings(directory=directory))
        live = LiveSettings(settings)
        registry = Registry(live, connector)
        try:
            registry.register(Hello("vm", vm.control_path, vm.io_path), Credentials.own())
            # From now on a hello may be for what never says READY.
            live.replace(replace(settings, vm=VmSettings(ready_timeout=0.01, ready_ping_after=0.005)))
            yield _House(Handlers(registry, live), registry, live), vm
        finally:
            for registered in registry.vms():
                registered.abort()
                assert registered.join(10)


class _Dribbling(socket.socket):
    """A connection out of which never more comes at once than its turn is."""

    sizes: Iterator[int]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """At least one byte, since none would be the end."""
        return super().recv(min(size, max(1, next(self.sizes))), flags)


def _client(house: _House, number: int, stream: bytes, cuts: Iterator[int]) -> None:
    """Send all of it, have it served, and then read all of the answers."""
    near, far = socket.socketpair()
    with far, _Dribbling(fileno=near.detach()) as served:
        for sock in (far, served):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        served.sizes = cuts
        far.sendall(stream)
        far.shutdown(socket.SHUT_WR)
        who = Credentials.of_peer(served)
        client = ClientInfo(number, who, house.registry.users.of(who.uid))
        connection = Connection(served, client, house.handlers, house.live, Rest())
        connection.converse()
        assert connection.after is After.END
        served.shutdown(socket.SHUT_WR)
        _check_answers(far, texts_in(stream)[0])


def _check_answers(sock: socket.socket, texts: list[bytes]) -> None:
    for text in texts:
        try:
            request = messages.decode(text, Request)
        except MemberError:
            assert "error" in _answer(sock, "")
            continue
        except ProtocolError:
            break
        answer = _answer(sock, request.id)
        if request.id not in _PAYLOADS[:-2]:
            assert "error" in answer
        if request.id == "allocateIO" and answer["success"]:
            _check_fd(sock)
    assert sock.recv(1) == b"", "more than was asked for"


def _answer(sock: socket.socket, name: str) -> dict[str, object]:
    """The next response: compact, its members in order, and not longer than every client can take."""
    length, reserved = messages.HEADER.unpack(_exactly(sock, messages.HEADER.size))
    text = _exactly(sock, length)
    answer: dict[str, object] = json.loads(text)
    assert not reserved
    assert length <= MAX_RESPONSE or name == "status"
    assert list(answer) == [name for name in ("success", "error", "data") if name in answer]
    assert answer["success"] is ("error" not in answer)
    assert json.loads(text.decode()) == answer
    assert text == json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() or name == "status"
    return answer


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"the answers end after {data!r}"
        data += piece
    return data


def _check_fd(sock: socket.socket) -> None:
    socket.socket(fileno=read_fd(sock, timeout=10)).close()


# The log ------------------------------------------------------------------------------------------------


class _Log(logging.Handler):
    """Takes every line of the log, in both its forms."""

    def __init__(self) -> None:
        super().__init__()
        self._before = faults.counts()
        self._level = logger.level
        self._lines: list[str] = []
        self._traces: list[str] = []

    def __enter__(self) -> _Log:
        logger.setLevel(CONSOLE)
        logger.addHandler(self)
        logger.propagate = False
        return self

    def __exit__(self, *exception: object) -> None:
        logger.removeHandler(self)
        logger.setLevel(self._level)
        logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        text, as_json = TextLines().format(record), JsonLines(timestamp=True).format(record)
        if record.exc_info:
            self._traces.append(text)
        else:
            self._lines += [text, as_json]
        json.loads(as_json)

    def check(self) -> None:
        assert not self._traces, self._traces[0]
        assert faults.counts() == self._before
        assert all(map(str.isprintable, self._lines)), self._lines
