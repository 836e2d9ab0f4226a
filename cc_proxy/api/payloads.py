"""The requests that a client may send, and their results: plain typed data, no I/O.

Each class is one row of the payload table (docs/protocol.md, 1). Members have Python names here and camel
case in JSON: `container_id` is `containerId` on the wire. Decoding is strict about types. An absent argument
becomes empty or 0, and the daemon decides what that means; absent `data` becomes `UNSET`.
"""

from typing import ClassVar

import msgspec
from msgspec import UNSET, Raw, UnsetType


class _Payload(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The base: immutable, camel case on the wire, empty optional members left out."""


class Hello(_Payload, frozen=True):
    """Register a VM and attach to it. Result: `Version`."""

    NAME: ClassVar[str] = "hello"

    container_id: str = ""
    #: Path of the socket that carries the control channel.
    ctl_serial: str = ""
    #: Path of the socket that carries the I/O channel.
    io_serial: str = ""
    #: Path of the VM's console socket, if it has one.
    console: str = ""


class Attach(_Payload, frozen=True):
    """Attach this connection to a registered VM. Result: `Version`."""

    NAME: ClassVar[str] = "attach"

    container_id: str = ""


class Bye(_Payload, frozen=True):
    """Unregister a VM. No result."""

    NAME: ClassVar[str] = "bye"

    container_id: str = ""


class AllocateIo(_Payload, frozen=True):
    """Allocate 1 or 2 streams, and the fd that carries them. Result: `AllocateIoResult`."""

    NAME: ClassVar[str] = "allocateIO"

    n_streams: int = 0


class Hyper(_Payload, frozen=True):
    """A command for the agent. No result.

    `data` goes to the agent byte for byte; `UNSET` means no data.
    """

    NAME: ClassVar[str] = "hyper"

    hyper_name: str = ""
    data: Raw | UnsetType = UNSET


class GetStatus(_Payload, frozen=True):
    """Ask for the state of the daemon and its VMs. Result: `Status`, of up to `MAX_STATUS` bytes."""

    NAME: ClassVar[str] = "status"


class SetLogLevel(_Payload, frozen=True):
    """Make the daemon log more or less, until it next reads its settings. Result: `LogLevelChange`."""

    NAME: ClassVar[str] = "logLevel"

    #: `error`, `warning`, `info`, `debug`, `io` or `console`.
    level: str = ""


class LogLevelChange(_Payload, frozen=True, omit_defaults=False):
    """The result of `logLevel`."""

    old: str
    new: str


#: The version of the protocol that docs/protocol.md describes; the daemon reports it in `Version`.
PROTOCOL_VERSION = 1


class Version(_Payload, frozen=True):
    """The result of `hello` and `attach`."""

    version: int


class AllocateIoResult(_Payload, frozen=True):
    """The result of `allocateIO`. The fd follows the response (`read_fd`).

    stdin and stdout have the seq `io_base`; stderr, if 2 streams were allocated, has `io_base + 1`.
    """

    io_base: int


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client sends: the name of a payload, and the payload itself as JSON text."""

    id: str = ""
    data: Raw | UnsetType = UNSET


class Response(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the daemon answers, with its members in this order. Empty `error` and `data` are left out."""

    success: bool
    error: str = ""
    data: Raw | UnsetType = UNSET


#: Anything `Client.request` can send.
Payload = Hello | Attach | Bye | AllocateIo | Hyper | GetStatus | SetLogLevel
