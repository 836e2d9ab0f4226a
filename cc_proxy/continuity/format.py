"""What is handed over from one process to the next, as bytes and fds.

A newer daemon reads what an older one has written: new members have a default, and no member changes its
meaning. If that is not enough, `VERSION` is raised.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from cc_proxy.api.status import Replaced
from cc_proxy.continuity.state import Record
from cc_proxy.continuity.state.clients import ConnectionRecord, ListenerState, ServerState
from cc_proxy.continuity.state.streams import SessionRecord
from cc_proxy.continuity.state.vms import GoneVmRecord, RegistryState, VmRecord
from cc_proxy.continuity.table import Unreadable
from cc_proxy.linux.fds import Fd, Identity, identity_of
from cc_proxy.settings import Settings

VERSION = 1

#: What is kept in the table.
AnyRecord = VmRecord | GoneVmRecord | SessionRecord | ConnectionRecord
#: The fds that were left to this process, by their identities.
Found = dict[Identity, int]

#: What a record of the table has in place of an fd that was closed before its part was over.
CLOSED = Fd(-1)

T = TypeVar("T")


class DaemonState(Struct, frozen=True, kw_only=True):
    """The whole daemon, at rest."""

    version: int = VERSION
    #: The version of the program that wrote it.
    program: str
    #: When it came to rest (CLOCK_MONOTONIC, which all processes share).
    rested_at: float
    #: The settings in force (`encode_settings`); and the log's level, if it is not that of the settings.
    settings: bytes
    log_level: str | None
    #: When the first process began (CLOCK_MONOTONIC), and how often it was replaced, this time included.
    known_since: float
    replaced: Replaced
    #: How many gaps there were, and how many bytes were lost in them at most.
    gaps: tuple[int, int] = (0, 0)
    #: Unexpected errors, by event.
    faults: dict[str, int]
    #: Requests that users may make at once, by uid.
    users: dict[int, float]
    registry: RegistryState
    server: ServerState


class _Header(Struct):
    version: int
    program: str


class DaemonRecord(Struct, frozen=True, kw_only=True):
    """What is kept of the daemon itself; see `DaemonState`."""

    version: int = VERSION
    program: str
    settings: bytes
    log_level: str | None
    known_since: float
    replaced: Replaced
    gaps: tuple[int, int]
    listener: ListenerState


def encode(state: DaemonState | DaemonRecord | Record) -> tuple[bytes, dict[int, Identity]]:
    """Return a state as bytes, and the fds that it names, in order, each with its identity.

    Raises `OSError` if one is closed.
    """
    fds: dict[int, Identity] = {}

    def encode_fd(value: Any) -> Identity:
        if not isinstance(value, Fd):
            raise NotImplementedError(f"no format for {type(value)}")
        return fds.setdefault(value.number, identity_of(value.number))

    return msgspec.msgpack.encode(state, enc_hook=encode_fd), fds


def find(fds: Iterable[int]) -> Found:
    """Return fds by their identities. Closes those that stand for the same thing as another."""
    found: Found = {}
    for fd in fds:
        if found.setdefault(identity_of(fd), fd) != fd:
            os.close(fd)
    return found


def decode(data: bytes, fds: Sequence[int]) -> DaemonState:
    """Return the state that was encoded, with the fds of this process. Raises `Unreadable`.

    Closes the fds that the state does not name; all of them if it raises.
    """
    found = find(fds)
    with taking_all(found):
        check_version(data)
        return take(data, DaemonState, found)


@contextlib.contextmanager
def taking_all(found: Found) -> Iterator[None]:
    """Close what has not been taken out at the end; or everything, after an error."""
    everything = dict(found)
    try:
        yield
    except BaseException:
        found |= everything
        raise
    finally:
        for fd in found.values():
            os.close(fd)


def check_version(data: bytes) -> None:
    """Raise `Unreadable` if a newer daemon has written the data."""
    try:
        header = msgspec.msgpack.decode(data, type=_Header)
    except msgspec.MsgspecError as error:
        raise Unreadable(str(error)) from None
    if header.version > VERSION:
        raise Unreadable(f"it was written by cc-proxy {header.program}, in a newer format")


def take_record(data: bytes, found: Found) -> AnyRecord:
    """Return a record of the table, as `take` does. Fds that are missing are `CLOSED`."""
    kind: Any = AnyRecord
    record: AnyRecord = take(data, kind, found, CLOSED)
    return record


def take(data: bytes, kind: type[T], found: Found, missing: Fd | None = None) -> T:
    """Return what was encoded. The fds that it names are taken out of `found`. Raises `Unreadable`.

    It also raises that if an fd is missing, unless `missing` is to take its place.
    """

    def decode_fd(kind: type[Any], value: Any) -> Any:
        if kind is not Fd:
            raise NotImplementedError(f"no format for {kind}")
        if (fd := found.pop(tuple(value), None)) is not None:
            return Fd(fd)
        if missing is None:
            raise ValueError("an fd is missing")
        return missing

    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=decode_fd)
    except msgspec.MsgspecError as error:
        raise Unreadable(str(error)) from None


def encode_settings(settings: Settings) -> bytes:
    """Return settings as bytes; empty if a path from the command line is no text."""
    with contextlib.suppress(UnicodeEncodeError):
        return msgspec.msgpack.encode(settings, enc_hook=lambda value: value.unknown or int(value))
    return b""


def decode_settings(data: bytes) -> Settings | None:
    """Return the settings that were encoded; None if this version cannot read them."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        return msgspec.msgpack.decode(data, type=Settings, dec_hook=lambda kind, given: kind.resolve(given))
    return None
