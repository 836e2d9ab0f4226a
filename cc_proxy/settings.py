"""The daemon's settings: one immutable value, read from a TOML file.

Every setting has a default; conf/cc-proxy.toml says what each is for. A file is checked whole before any of
it takes effect.
"""

import errno
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from cc_proxy.access import Access
from cc_proxy.api.transport import DEFAULT_SOCKET
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH
from cc_proxy.log.levels import LogFormat, LogLevel
from cc_proxy.log.printable import printable

#: Read if it exists and no other file is named.
DEFAULT_FILE = "/etc/cc-proxy/cc-proxy.toml"

#: Longest file that is read, in characters: many times longer than any real one.
_MOST_READ = 1024 * 1024

_CHOICES: dict[str, tuple[str, ...]] = {"log.level": get_args(LogLevel), "log.format": get_args(LogFormat)}

#: msgspec's names of types, in TOML's words.
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "a table",
    "null": "nothing",
}

_Path = Annotated[str, Meta(pattern=r"^/[^\x00]*$", description="an absolute path")]
_Seconds = Annotated[float, Meta(gt=0, le=86_400)]
_Bytes = Annotated[int, Meta(ge=0, le=2**50)]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class SettingsError(Exception):
    """A settings file cannot be used; the text names the file, the key and what was expected."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common shape of the tables: immutable, and strict about unknown keys."""


class LogSettings(_Table, frozen=True):
    """What is logged, and in which format."""

    level: LogLevel = "info"
    format: LogFormat = "auto"


class VmSettings(_Table, frozen=True):
    """How long a VM may take for what it does. In seconds."""

    ready_timeout: _Seconds = 30.0
    ready_ping_after: _Seconds = 5.0
    command_timeout: _Seconds = 60.0
    bye_linger: Annotated[float, Meta(ge=0, le=86_400)] = 10.0


class StdinSettings(_Table, frozen=True):
    """How stdin is paced (docs/protocol.md, the agent's stdin)."""

    #: Bytes of payload that a process may be sent before its agent acknowledges them; 0: no pacing.
    window: Annotated[int, Meta(ge=0, le=1_048_576)] = 512
    #: Seconds until an agent that has not acknowledged them is asked again.
    echo_timeout: _Seconds = 0.1


class SpoolSettings(_Table, frozen=True):
    """Where output waits for clients that do not read it."""

    directory: _Path = "/var/tmp"  # noqa: S108 - files there are made without a name
    session_limit: _Bytes = 64 * 1024 * 1024
    user_limit: _Bytes = 512 * 1024 * 1024
    total_limit: _Bytes = 1024 * 1024 * 1024


class UserLimits(_Table, frozen=True):
    """How much one user may have at once. For root only the totals apply."""

    connections: _Count = 1_024
    vms: _Count = 64
    sessions: _Count = 2_048
    commands: _Count = 512
    request_bytes: _Bytes = 16 * 1024 * 1024
    #: Requests per second while other users are connected, after five seconds' worth at once.
    request_rate: _Count = 100


class Limits(_Table, frozen=True):
    """How much there may be at once, for all users together."""

    connections: _Count = 16_384
    vms: _Count = 1_024
    sessions: _Count = 32_768
    #: Those that wait for their VMs' answers.
    commands: _Count = 8_192
    #: Of requests over 4 KiB that have no answer yet (as announced, until they have arrived whole), of
    #: responses over 4 KiB that clients have not read, and of the ids of VMs.
    request_bytes: _Bytes = 256 * 1024 * 1024
    user: UserLimits = UserLimits()
    #: Seconds for a message to arrive once it has begun, and for a client to read a response.
    message_timeout: _Seconds = 30.0


class Settings(_Table, frozen=True):
    """Everything that can be set."""

    socket_path: _Path = DEFAULT_SOCKET
    access: Access = msgspec.field(default_factory=Access)
    log: LogSettings = LogSettings()
    vm: VmSettings = VmSettings()
    stdin: StdinSettings = StdinSettings()
    spool: SpoolSettings = SpoolSettings()
    limits: Limits = Limits()


#: Old and new value, by the name of the setting.
Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Reload:
    """The outcome of replacing settings: which have changed, and which new values wait for a restart."""

    changed: Changes
    waiting: Changes


class LiveSettings:
    """The settings in force. Code that uses one reads `current` each time it needs it.

    One thread replaces `current`, always as a whole. Any thread may read it.
    """

    def __init__(self, settings: Settings) -> None:
        self.current = settings

    def replace(self, new: Settings) -> Reload:
        """Put `new` in force, except what the daemon reads only when it starts. One thread."""
        old = self.current
        replace = msgspec.structs.replace
        self.current = replace(
            new,
            socket_path=old.socket_path,
            log=replace(new.log, format=old.log.format),
            spool=replace(new.spool, directory=old.spool.directory),
        )
        return Reload(differences(old, self.current), differences(self.current, new))


def differences(old: Settings, new: Settings) -> Changes:
    """Return the settings that differ."""
    before, after = _flatten(old), _flatten(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _flatten(table: msgspec.Struct, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(table).items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, msgspec.Struct)
            else {prefix + name: value}
        )
    return flat


def parse(text: str, source: str) -> Settings:
    """Return the settings that a TOML text describes. Raises `SettingsError`, naming `source` and the key."""
    try:
        settings = msgspec.convert(tomllib.loads(text), Settings, dec_hook=_resolve)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{source}: {printable(_explain(str(error)))}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and an int of thousands of digits
        raise SettingsError(f"{source}: not valid TOML: {printable(str(error))}") from None
    size = len(settings.socket_path.encode())
    if size > MAX_SOCKET_PATH:
        raise SettingsError(f"{source}: socket_path: {size} bytes, expected {MAX_SOCKET_PATH} at most")
    return settings


def _resolve(kind: type[Any], given: Any) -> Any:
    """Turn the name or number of a user or group into a `UserId` or `GroupId`."""
    return kind.resolve(given)


def load(path: str | None = None) -> Settings:
    """Read `path`, or the default file if that exists, or take the defaults.

    Raises `SettingsError` if the file cannot be read or has a mistake.
    """
    try:
        with open(path or DEFAULT_FILE, encoding="utf-8", opener=_open_regular) as file:
            text = file.read(_MOST_READ + 1)
    except (OSError, UnicodeDecodeError) as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Settings()
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"{path or DEFAULT_FILE}: cannot be read: {reason}") from None
    if len(text) > _MOST_READ:
        raise SettingsError(f"{path or DEFAULT_FILE}: longer than {_MOST_READ} characters")
    return parse(text, path or DEFAULT_FILE)


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file only: opening anything else may block or have an effect. Raises `OSError`."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(mode) else "not a regular file")


def file_read(path: str | None = None) -> str:
    """Return the absolute path of the file that `load` reads; empty if there is none."""
    if path is None and not os.path.exists(DEFAULT_FILE):
        return ""
    return os.path.abspath(path or DEFAULT_FILE)


def _explain(error: str) -> str:
    """Turn msgspec's ``what - at `$.table.key` `` into `table.key: what`, in the words of TOML."""
    if " - at `$" not in error:
        return _in_words(error)
    what, _, where = error.rpartition(" - at `$")
    key = where.strip("`").lstrip(".").partition("[")[0]
    if key in _CHOICES and what.startswith("Invalid enum value"):
        got = what.removeprefix("Invalid enum value")
        what = f"expected one of {', '.join(_CHOICES[key])}, got{got}"
    elif "regex" in what:
        what = "expected an absolute path"
    else:
        what = _in_words(what)
    return f"{key}: {what}" if key else what


def _in_words(what: str) -> str:
    """Turn ``Expected `int` >= 1, got `str` `` into the words of TOML."""
    what = what.replace("Object contains unknown field", "unknown setting").replace("Expected", "expected")
    return re.sub(r"`(\w+)`(?=[ ,]|$)", lambda name: _TYPES.get(name[1], name[0]), what)
