"""The daemon's settings: one immutable value, read from a TOML file.

Every setting has a default, and conf/cc-proxy.toml says why it is there; what a file says is checked whole
before any of it counts.
"""

import os
import tomllib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cc_proxy.api.client import DEFAULT_SOCKET

#: Read if it exists and no other file was named.
DEFAULT_FILE = "/etc/cc-proxy/cc-proxy.toml"

LogLevel = Literal["error", "warning", "info", "debug", "io", "console"]
LogFormat = Literal["auto", "json", "text"]

_Path = Annotated[str, Meta(pattern=r"^/[^\x00]*$", description="an absolute path")]
_Seconds = Annotated[float, Meta(gt=0, le=86_400)]
_Bytes = Annotated[int, Meta(ge=0, le=2**50)]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class SettingsError(Exception):
    """A settings file that cannot be used; the text names the file, the key and what was expected."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common shape of the tables: immutable, and strict about unknown keys."""


class Log(_Table, frozen=True):
    """What is logged, and how it looks."""

    level: LogLevel = "info"
    format: LogFormat = "auto"


class Vm(_Table, frozen=True):
    """How long a VM may take. In seconds."""

    ready_timeout: _Seconds = 30.0
    ready_ping_after: _Seconds = 5.0
    command_timeout: _Seconds = 60.0
    bye_linger: Annotated[float, Meta(ge=0, le=86_400)] = 10.0


class Stdin(_Table, frozen=True):
    """How stdin is paced (hyperstart.md, lossless stdin)."""

    #: Payload bytes a process may be sent before its agent has to say that it took them; 0: no pacing.
    window: Annotated[int, Meta(ge=0, le=1_048_576)] = 512
    #: Seconds until an agent that has not said so is asked again.
    echo_timeout: _Seconds = 1.0


class Spool(_Table, frozen=True):
    """Where output waits for clients that do not read it."""

    directory: _Path = "/var/tmp"  # noqa: S108 - files there are made without a name
    session_limit: _Bytes = 64 * 1024 * 1024
    total_limit: _Bytes = 1024 * 1024 * 1024


class Limits(_Table, frozen=True):
    """How much there may be at once."""

    connections: _Count = 16_384
    vms: _Count = 1_024
    #: Seconds for a message to arrive once it has begun to, and for a response to be taken.
    message_timeout: _Seconds = 30.0


class Settings(_Table, frozen=True):
    """Everything that can be set."""

    socket_path: _Path = DEFAULT_SOCKET
    log: Log = Log()
    vm: Vm = Vm()
    stdin: Stdin = Stdin()
    spool: Spool = Spool()
    limits: Limits = Limits()


def parse(text: str, source: str) -> Settings:
    """Return the settings that a TOML text describes. Raises `SettingsError`, naming `source` and the key."""
    try:
        return msgspec.convert(tomllib.loads(text), Settings)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source}: not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise SettingsError(f"{source}: {_explain(str(error))}") from None


def load(path: str | None = None) -> Settings:
    """Read `path`, or the default file if that exists, or take the defaults.

    Raises `SettingsError` if the file cannot be read or is not right.
    """
    if path is None:
        if not os.path.exists(DEFAULT_FILE):
            return Settings()
        path = DEFAULT_FILE
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"{path}: cannot be read: {reason}") from None
    return parse(text, path)


def _explain(error: str) -> str:
    """Turn msgspec's `what - at `$.table.key`` into `table.key: what`."""
    what, _, where = error.partition(" - at `$")
    key = where.strip("`").lstrip(".")
    return f"{key}: {what}" if key else what
