"""What is handed over from one process to the next, as bytes and fds.

A newer daemon reads what an older one has written: members are added with a default, and never change their
meaning. Where that is not enough, `VERSION` is raised.
"""

import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from cc_proxy.api.status import Replaced
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.clients.state import ServerState
from cc_proxy.proxy.vms.state import RegistryState
from cc_proxy.settings import Settings

VERSION = 1

#: By device and inode an fd is known in any process.
_Identity = tuple[int, int]


class Unreadable(Exception):
    """What was handed over cannot be read; the text says why."""


class DaemonState(Struct, frozen=True, kw_only=True):
    """The whole daemon, at rest."""

    version: int = VERSION
    #: The version of the program that wrote it.
    program: str
    #: When it came to rest (CLOCK_MONOTONIC, which all processes share).
    rested_at: float
    #: What was in force, in its own encoding; and the log's level, if that was changed since.
    settings: bytes
    log_level: str | None
    #: When the first process began (CLOCK_MONOTONIC), and how often it was replaced, this time included.
    known_since: float
    replaced: Replaced
    #: Errors that nobody expected, by event.
    faults: dict[str, int]
    #: Requests that users may make at once, by uid.
    users: dict[int, float]
    registry: RegistryState
    server: ServerState


class _Header(Struct):
    version: int
    program: str


def encode(state: DaemonState) -> tuple[bytes, list[int]]:
    """Return a state as bytes, and the fds that it names."""
    fds: list[int] = []

    def encode_fd(value: Any) -> _Identity:
        if not isinstance(value, Fd):
            raise NotImplementedError(f"no format for {type(value)}")
        fds.append(value.number)
        return _identity(value.number)

    return msgspec.msgpack.encode(state, enc_hook=encode_fd), fds


def decode(data: bytes, fds: Sequence[int]) -> DaemonState:
    """Return the state that was encoded, with the fds of this process. Raises `Unreadable`.

    Closes those that it does not name, or all.
    """
    left = _by_identity(fds)
    try:
        return _decode(data, left)
    except BaseException:
        left = _by_identity(fds)
        raise
    finally:
        for fd in itertools.chain.from_iterable(left.values()):
            os.close(fd)


def _by_identity(fds: Sequence[int]) -> dict[_Identity, list[int]]:
    """Two sockets may have the same inode, as the kernel's counter wraps around: they keep their order."""
    found: dict[_Identity, list[int]] = {}
    for fd in fds:
        found.setdefault(_identity(fd), []).append(fd)
    return found


def _decode(data: bytes, fds: dict[_Identity, list[int]]) -> DaemonState:

    def decode_fd(kind: type[Any], value: Any) -> Any:
        if kind is not Fd:
            raise NotImplementedError(f"no format for {kind}")
        try:
            return Fd(fds[tuple(value)].pop(0))
        except (KeyError, IndexError):
            raise ValueError("an fd is missing") from None

    try:
        header = msgspec.msgpack.decode(data, type=_Header)
        if header.version > VERSION:
            raise Unreadable(f"it was written by cc-proxy {header.program}, in a newer format")
        return msgspec.msgpack.decode(data, type=DaemonState, dec_hook=decode_fd)
    except msgspec.MsgspecError as error:
        raise Unreadable(str(error)) from None


def encode_settings(settings: Settings) -> bytes:
    """Return settings as bytes; none if a path of the command line is no text."""
    with contextlib.suppress(UnicodeEncodeError):
        return msgspec.msgpack.encode(settings, enc_hook=lambda value: value.unknown or int(value))
    return b""


def decode_settings(data: bytes) -> Settings | None:
    """Return the settings that were encoded; None if they mean nothing any more."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        return msgspec.msgpack.decode(data, type=Settings, dec_hook=lambda kind, given: kind.resolve(given))
    return None


def _identity(fd: int) -> _Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
