"""What each payload does (docs/protocol.md, 1). No client's socket is touched here: text in, reply out."""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UnsetType
from msgspec.json import Decoder

from cc_proxy.access import may_operate, may_use
from cc_proxy.api import messages
from cc_proxy.api.messages import MemberError
from cc_proxy.api.payloads import (
    AllocateIo,
    AllocateIoResult,
    Attach,
    Bye,
    GetStatus,
    Hello,
    Hyper,
    LogLevelChange,
    Payload,
    Request,
    Response,
    SetLogLevel,
    Version,
)
from cc_proxy.api.status import MOST_VMS
from cc_proxy.hyperstart.codes import COMMANDS
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import LEVELS, current_level, logger, set_level
from cc_proxy.proxy.clients.status import About, describe
from cc_proxy.proxy.users import LimitReached, Share
from cc_proxy.proxy.vms.registry import Registry, RegistryError
from cc_proxy.proxy.vms.vm import State, Vm, VmError
from cc_proxy.settings import LiveSettings

PROTOCOL_VERSION = 1
#: Longest response text that the runtime in the field takes.
MAX_RESPONSE = 1024

_ELLIPSIS = "…"

#: A hello counts as so many requests more, for its connections, its pump and their end; and one that fails,
#: which is easily repeated, as so many more again.
_HELLO, _FAILED_HELLO = 6, 5
#: Streams count as so many more, for their fds, and since the pump has to take them over and drop them.
_STREAMS = 2
#: What is longer, in bytes, may take long. No client in the field sends such requests.
_SHORT = 16 * 1024
#: Seconds of a CPU that a request may take without a rest, and how many times as long that is. While a long
#: text is decoded nobody else runs, so that is to be rare: fewer than one in a hundred requests may meet it.
_LONG = 0.000_5
_REST = 4.0
_REST_OF_LONG = 100.0
#: VMs whose pumps a `status` asks, for which it counts as one request more.
_VMS_A_REQUEST = 3
_LONGEST_REST = 30.0


class Refusal(Exception):
    """A request that is refused; the text is what the client is told."""


@dataclass(slots=True, eq=False)
class Client:
    """What is known of one connection, and of whoever made it."""

    number: int
    who: Credentials
    share: Share
    vm: Vm | None = field(default=None)


@dataclass(slots=True)
class Reply:
    """A response as bytes, and the socket whose fd goes out behind it, which is then to be closed."""

    message: bytes
    passed: socket.socket | None = None


_DONE = Reply(messages.encode(Response(True)))


def success(result: msgspec.Struct) -> Reply:
    """Return the response that carries a result."""
    return Reply(messages.encode(_carrying(result)))


def _carrying(result: msgspec.Struct) -> Response:
    return Response(True, data=msgspec.Raw(msgspec.json.encode(result)))


_ATTACHED = success(Version(PROTOCOL_VERSION))


def failure(text: str) -> Reply:
    """Return the response that carries an error, shortened to what every client can take."""
    if len(text) <= MAX_RESPONSE:
        message = messages.encode(Response(False, text))
        if len(message) - messages.HEADER.size <= MAX_RESPONSE:
            return Reply(message)
    fits, too_long = 0, min(len(text), MAX_RESPONSE)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        message = messages.encode(Response(False, text[:middle] + _ELLIPSIS))
        if len(message) - messages.HEADER.size <= MAX_RESPONSE:
            fits = middle
        else:
            too_long = middle
    return Reply(messages.encode(Response(False, text[:fits] + _ELLIPSIS)))


class Handlers:
    """The payload table. Any thread may call, one at a time for a client."""

    def __init__(self, registry: Registry, live: LiveSettings, about: About | None = None) -> None:
        self._registry = registry
        self._live = live
        self._about = about or About()
        #: Who is connected. Adding, removing and copying are single steps of the interpreter: no lock needed.
        self.clients: set[Client] = set()
        handlers: dict[type[Payload], Callable[[Client, Any], Reply]] = {
            Hello: self._hello,
            Attach: self._attach,
            Bye: self._bye,
            AllocateIo: self._allocate_io,
            Hyper: self._hyper,
            GetStatus: self._status,
            SetLogLevel: self._log_level,
        }
        self._table = {kind.NAME: (Decoder(kind), handler) for kind, handler in handlers.items()}

    def answer(self, client: Client, text: bytes) -> Reply:
        """Carry out the request in a message's text; returns the one reply to it.

        Raises `ProtocolError` if the text is not a JSON object.
        """
        with client.share.turn:
            client.share.pace()
            return self._answer(client, text) if len(text) <= _SHORT else self._answer_long(client, text)

    def _answer_long(self, client: Client, text: bytes) -> Reply:
        begun = time.thread_time()
        try:
            return self._answer(client, text)
        finally:
            _rest(client, time.thread_time() - begun, _REST_OF_LONG)

    def _answer(self, client: Client, text: bytes) -> Reply:
        name, arguments = "", None
        try:
            request = messages.decode(text, Request)
            name = request.id
            handler, arguments = self._resolve(request)
            reply = handler(client, arguments)
        except (LimitReached, MemberError, Refusal, RegistryError, VmError) as error:
            reply = failure(str(error))
            if isinstance(error, LimitReached):
                who = {"pid": client.who.pid, "uid": client.who.uid}
                logger.warning("limit reached", extra={"payload": name, "error": str(error), **who})
            _log("request refused", client, name, arguments, error=str(error)[:200])
        else:
            _log("request", client, name, arguments)
        return reply

    def _resolve(self, request: Request) -> tuple[Callable[[Client, Any], Reply], Any]:
        """Return what answers a request, and the request's arguments."""
        if not request.id:
            raise Refusal("no 'id' field in request")
        if request.id not in self._table:
            raise Refusal(f"no payload named '{request.id}'")
        decoder, handler = self._table[request.id]
        return handler, _arguments(request, decoder)

    def _hello(self, client: Client, hello: Hello) -> Reply:
        if not (hello.container_id and hello.ctl_serial and hello.io_serial):
            raise Refusal("malformed hello command")
        client.share.pace(_HELLO)
        try:
            with client.share.aside():
                client.vm = self._registry.register(hello, client.who)
        except (LimitReached, RegistryError, VmError):
            client.share.pace(_FAILED_HELLO)
            raise
        return _ATTACHED

    def _attach(self, client: Client, attach: Attach) -> Reply:
        client.vm = self._registry.get(attach.container_id, client.who)
        return _ATTACHED

    def _bye(self, client: Client, bye: Bye) -> Reply:
        self._registry.unregister(bye.container_id, client.who)
        client.vm = None
        return _DONE

    def _allocate_io(self, client: Client, allocate: AllocateIo) -> Reply:
        if allocate.n_streams not in (1, 2):
            raise Refusal(f"asking for unexpected number of streams ({allocate.n_streams})")
        vm = client.vm
        if vm is None or vm.state not in (State.UP, State.LEAVING):
            raise Refusal("client not attached to a vm")
        client.share.pace(_STREAMS)
        io_base, fd = vm.open_session(allocate.n_streams, client.share, client.who.pid)
        reply = success(AllocateIoResult(io_base))
        reply.passed = fd
        return reply

    def _hyper(self, client: Client, hyper: Hyper) -> Reply:
        if client.vm is None:
            raise Refusal("client not attached to a vm")
        code = COMMANDS.get(hyper.hyper_name)
        if code is None:
            raise Refusal(f"unknown command '{hyper.hyper_name}'")
        data = b"" if isinstance(hyper.data, UnsetType) else bytes(hyper.data)
        with client.share.aside("commands"):
            client.vm.command(code, data)
        return _DONE

    def _status(self, client: Client, _asked: GetStatus) -> Reply:
        share = client.share
        share.pace(len(self._registry.vms_of(client.who)[:MOST_VMS]) // _VMS_A_REQUEST)
        begun = time.thread_time()
        with share.aside(), share.asking:
            status = describe(self._about, self._registry, client.who, self._connections(client.who))
        reply = Reply(messages.encode(_carrying(status), messages.MAX_STATUS))
        _rest(client, time.thread_time() - begun, _REST)
        return reply

    def _connections(self, who: Credentials) -> list[Vm | None]:
        """Return the VM, if any, of each connection that a client may know of: its user's, or all."""
        access = self._live.current.access
        return [other.vm for other in list(self.clients) if may_use(access, who, other.who.uid)]

    def _log_level(self, client: Client, change: SetLogLevel) -> Reply:
        if not may_operate(self._live.current.access, client.who):
            raise Refusal(f"user {client.who.uid} may not set the log level: access.admins names who may")
        if change.level not in LEVELS:
            raise Refusal(f"unknown log level '{change.level}': it is one of {', '.join(LEVELS)}")
        old, new = current_level(), change.level
        # The more talkative of the two logs the change.
        set_level(min(old, new, key=LEVELS.__getitem__))
        fields = {"client": client.number, "uid": client.who.uid, "old": old, "new": new}
        logger.info("log level changed", extra=fields)
        set_level(new)
        return success(LogLevelChange(old, new))


def _rest(client: Client, seconds: float, times: float) -> None:
    """Have a user whose request took long wait, so that others come to their turns."""
    if client.share.others and seconds > _LONG:
        time.sleep(min(seconds * times, _LONGEST_REST))


def _arguments(request: Request, decoder: Decoder[Any]) -> Any:
    """Decode a request's `data`; absent, or null, it is an empty object. Raises `MemberError`."""
    data = b"" if isinstance(request.data, UnsetType) else bytes(request.data)
    try:
        return decoder.decode(b"{}" if data in (b"", b"null") else data)
    except ValueError as error:
        raise MemberError(f"{request.id}: {error}") from None


def _log(event: str, client: Client, name: str, arguments: object, **more: str) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        if isinstance(arguments, Hyper):
            more["command"] = arguments.hyper_name[:64]
        vm = client.vm.container_id if client.vm else None
        logger.debug(event, extra={"client": client.number, "payload": name[:64], "vm": vm, **more})
