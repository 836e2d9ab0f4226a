"""Carries out each payload (docs/protocol.md, 1). No socket is read or written here: text in, reply out."""

import bisect
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from msgspec import UnsetType
from msgspec.json import Decoder

from cc_proxy.access import may_operate, may_use
from cc_proxy.api import messages
from cc_proxy.api.messages import MAX_RESPONSE, MemberError
from cc_proxy.api.payloads import (
    PROTOCOL_VERSION,
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
from cc_proxy.continuity.keeper import NOTHING, Keeper
from cc_proxy.hyperstart.codes import COMMANDS
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import LEVELS, current_level, logger, set_level
from cc_proxy.proxy.clients.status import About, describe
from cc_proxy.proxy.users import LimitReached, User
from cc_proxy.proxy.vms.registry import Registry, RegistryError
from cc_proxy.proxy.vms.states import VmError
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import LiveSettings


class Refusal(Exception):
    """A request is refused; the text tells the client why."""


@dataclass(slots=True, eq=False)
class ClientInfo:
    """One connection, and the client that made it."""

    number: int
    who: Credentials
    user: User
    vm: Vm | None = field(default=None)
    #: Whether the previous process began the request that the client waits for.
    resumes: bool = field(default=False)
    #: Returns whether the client has not hung up. Only the thread that serves it calls this.
    is_here: Callable[[], bool] = field(default=lambda: True)

    @property
    def fields(self) -> dict[str, int]:
        """The fields that identify it in the log."""
        return {"client": self.number, "pid": self.who.pid, "uid": self.who.uid}


class Reply(NamedTuple):
    """A response as bytes, and the socket, if any, whose fd is passed after it; the sender closes that."""

    message: bytes
    passed: socket.socket | None = None


_DONE = Reply(messages.encode(Response(True)))


def success(
    result: msgspec.Struct, passed: socket.socket | None = None, limit: int = messages.MAX_TEXT
) -> Reply:
    """Return the response with a result. Its text has at most `limit` bytes."""
    response = Response(True, data=msgspec.Raw(msgspec.json.encode(result)))
    return Reply(messages.encode(response, limit), passed)


_ATTACHED = success(Version(PROTOCOL_VERSION))


def failure(text: str) -> Reply:
    """Return the response with an error, shortened to what every client accepts."""

    def message(kept: int) -> bytes:
        return messages.encode(Response(False, text if kept == len(text) else text[:kept] + "…"))

    longest = messages.HEADER.size + MAX_RESPONSE
    most = min(len(text), MAX_RESPONSE)
    if len(whole := message(most)) <= longest:
        return Reply(whole)
    fit = bisect.bisect_right(range(most), longest, key=lambda kept: len(message(kept)))
    return Reply(message(fit - 1))


class _Entry(NamedTuple):
    """How one payload is answered."""

    decoder: Decoder[Any]
    handler: Callable[[ClientInfo, Any], Reply]
    #: Whether it may have to wait for a VM or for other threads.
    waits: bool


class Handlers:
    """The payload table. Any thread may call, but for each client only one at a time."""

    def __init__(
        self, registry: Registry, live: LiveSettings, about: About | None = None, keeper: Keeper = NOTHING
    ) -> None:
        #: Keeps the connections that have to outlive the process.
        self.keeper = keeper
        self._registry = registry
        self._live = live
        self._about = about or About()
        #: The connected clients. No lock: adding, removing and copying are atomic under the GIL.
        self.clients: set[ClientInfo] = set()
        entries: list[tuple[type[Payload], Callable[[ClientInfo, Any], Reply], bool]] = [
            (Hello, self._hello, True),
            (Attach, self._attach, False),
            (Bye, self._bye, False),
            (AllocateIo, self._allocate_io, False),
            (Hyper, self._hyper, True),
            (GetStatus, self._status, True),
            (SetLogLevel, self._log_level, False),
        ]
        self._table = {kind.NAME: _Entry(Decoder(kind), handler, waits) for kind, handler, waits in entries}

    def answer(self, client: ClientInfo, text: bytes) -> Reply:
        """Carry out the request in a message's text, however long that takes; returns its reply.

        Raises `ProtocolError` if the text is not a JSON object, or `Resting` if it has to be called again.
        """
        reply = self._answer(client, text, may_wait=True)
        assert reply
        return reply

    def answer_at_once(self, client: ClientInfo, text: bytes) -> Reply | None:
        """Do the same if it cannot take long. Otherwise do nothing, and return None."""
        return self._answer(client, text, may_wait=False)

    def _answer(self, client: ClientInfo, text: bytes, *, may_wait: bool) -> Reply | None:
        name, arguments = "", None
        try:
            with client.user.decoding:
                request = messages.decode(text, Request)
                name = request.id
                entry = self._find(name)
                if entry.waits and not may_wait:
                    return None
                arguments = _arguments(request, entry.decoder)
            reply = entry.handler(client, arguments)
        except (LimitReached, MemberError, Refusal, RegistryError, VmError) as error:
            reply = failure(str(error))
            if isinstance(error, LimitReached):
                who = {"pid": client.who.pid, "uid": client.who.uid}
                logger.warning("limit reached", extra={"payload": name, "error": str(error), **who})
            _log("request refused", client, name, arguments, error=str(error)[:200])
        else:
            _log("request", client, name, arguments)
        return reply

    def _find(self, name: str) -> _Entry:
        """Return the entry of a payload. Raises `Refusal`."""
        if not name:
            raise Refusal("no 'id' field in request")
        entry = self._table.get(name)
        if entry is None:
            raise Refusal(f"no payload named '{name}'")
        return entry

    def _hello(self, client: ClientInfo, hello: Hello) -> Reply:
        if not (hello.container_id and hello.ctl_serial and hello.io_serial):
            raise Refusal("malformed hello command")
        client.vm = self._registry.register(hello, client.who, client.is_here, client.number)
        return _ATTACHED

    def _attach(self, client: ClientInfo, attach: Attach) -> Reply:
        vm = client.vm = self._registry.get(attach.container_id, client.who)
        if vm.owner != client.who.uid:  # root or an admin, who should know that the agent is another user's
            logger.info(
                "attached to another user's VM",
                extra={**client.fields, "vm": vm.container_id, "owner": vm.owner},
            )
        return _ATTACHED

    def _bye(self, client: ClientInfo, bye: Bye) -> Reply:
        self._registry.unregister(bye.container_id, client.who)
        client.vm = None
        return _DONE

    def _allocate_io(self, client: ClientInfo, allocate: AllocateIo) -> Reply:
        if allocate.n_streams not in (1, 2):
            raise Refusal(f"asking for unexpected number of streams ({allocate.n_streams})")
        if client.vm is None:
            raise Refusal("client not attached to a vm")
        io_base, fd = client.vm.open_session(allocate.n_streams, client.user, client.who.pid)
        return success(AllocateIoResult(io_base), fd)

    def _hyper(self, client: ClientInfo, hyper: Hyper) -> Reply:
        if client.vm is None:
            raise Refusal("client not attached to a vm")
        code = COMMANDS.get(hyper.hyper_name)
        if code is None:
            raise Refusal(f"unknown command '{hyper.hyper_name}'")
        data = b"" if isinstance(hyper.data, UnsetType) else bytes(hyper.data)
        charge = client.user.charge_again if client.resumes else client.user.charge
        with charge("commands"):
            client.vm.command(code, data, client.number)
        return _DONE

    def _status(self, client: ClientInfo, _asked: GetStatus) -> Reply:
        status = describe(self._about, self._registry, client.who, self._connections(client.who))
        return success(status, limit=messages.MAX_STATUS)

    def _connections(self, who: Credentials) -> list[Vm | None]:
        """Return the VM, or None, of each connection that a client may see: its user's, or all."""
        access = self._live.current.access
        return [other.vm for other in list(self.clients) if may_use(access, who, other.who.uid)]

    def _log_level(self, client: ClientInfo, change: SetLogLevel) -> Reply:
        if not may_operate(self._live.current.access, client.who):
            raise Refusal(f"user {client.who.uid} may not set the log level: access.admins names who may")
        if change.level not in LEVELS:
            raise Refusal(f"unknown log level '{change.level}': it is one of {', '.join(LEVELS)}")
        old, new = current_level(), change.level
        # Log the change at whichever of the two levels logs more.
        set_level(min(old, new, key=LEVELS.__getitem__))
        fields = {"client": client.number, "uid": client.who.uid, "old": old, "new": new}
        logger.info("log level changed", extra=fields)
        set_level(new)
        return success(LogLevelChange(old, new))


def _arguments(request: Request, decoder: Decoder[Any]) -> Any:
    """Decode a request's `data`. If that is absent or null, it is an empty object. Raises `MemberError`."""
    data = b"" if isinstance(request.data, UnsetType) else bytes(request.data)
    try:
        return decoder.decode(b"{}" if data in (b"", b"null") else data)
    except ValueError as error:
        raise MemberError(f"{request.id}: {error}") from None


def _log(event: str, client: ClientInfo, name: str, arguments: object, **more: str) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        if isinstance(arguments, Hyper):
            more["command"] = arguments.hyper_name[:64]
        vm = client.vm.container_id if client.vm else None
        logger.debug(event, extra={"client": client.number, "payload": name[:64], "vm": vm, **more})
