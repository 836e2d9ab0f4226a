"""The daemon's settings: one immutable value, read from a TOML file.

Every setting has a default; conf/cc-proxy.toml says what each is for. A file is checked whole before any of
it takes effect.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from cc_proxy import settingsfile
from cc_proxy.access import Access
from cc_proxy.api.transport import DEFAULT_SOCKET
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH
from cc_proxy.log.levels import LogFormat, LogLevel
from cc_proxy.settingsfile import AbsolutePath, SettingsError, SettingsTable

#: Read if it exists and no other file is named.
DEFAULT_FILE = "/etc/cc-proxy/cc-proxy.toml"

_CHOICES: dict[str, tuple[str, ...]] = {"log.level": get_args(LogLevel), "log.format": get_args(LogFormat)}

_Seconds = Annotated[float, Meta(gt=0, le=86_400)]
_Bytes = Annotated[int, Meta(ge=0, le=2**50)]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class LogSettings(SettingsTable, frozen=True):
    """What is logged, and in which format."""

    level: LogLevel = "info"
    format: LogFormat = "auto"


class VmSettings(SettingsTable, frozen=True):
    """How long to wait for a VM, in seconds."""

    ready_timeout: _Seconds = 30.0
    ready_ping_after: _Seconds = 5.0
    command_timeout: _Seconds = 60.0
    bye_linger: Annotated[float, Meta(ge=0, le=86_400)] = 10.0


class StdinSettings(SettingsTable, frozen=True):
    """How stdin is paced (docs/protocol.md, the agent's stdin)."""

    #: Bytes of payload that a process may be sent before its agent acknowledges them; 0 for no pacing.
    window: Annotated[int, Meta(ge=0, le=1_048_576)] = 512
    #: Seconds until an agent that has not acknowledged them is asked again.
    echo_timeout: _Seconds = 0.1


class SpoolSettings(SettingsTable, frozen=True):
    """Where output waits for clients that do not read it."""

    directory: AbsolutePath = "/var/tmp"  # noqa: S108 - files there are made without a name
    session_limit: _Bytes = 64 * 1024 * 1024
    user_limit: _Bytes = 512 * 1024 * 1024
    total_limit: _Bytes = 1024 * 1024 * 1024


class UserLimits(SettingsTable, frozen=True):
    """How much one user may have at once. For root only the totals apply."""

    connections: _Count = 1_024
    vms: _Count = 64
    sessions: _Count = 2_048
    commands: _Count = 512
    request_bytes: _Bytes = 16 * 1024 * 1024
    #: Requests per second while other users are connected, after a burst of five seconds' worth.
    request_rate: _Count = 100


class Limits(SettingsTable, frozen=True):
    """How much there may be at once, for all users together."""

    connections: _Count = 16_384
    vms: _Count = 1_024
    sessions: _Count = 32_768
    #: Commands that wait for their VMs' answers.
    commands: _Count = 8_192
    #: Bytes of unanswered requests over 4 KiB (of the length announced, until all has arrived), of responses
    #: over 4 KiB that clients have not read, and of VM ids.
    request_bytes: _Bytes = 256 * 1024 * 1024
    user: UserLimits = UserLimits()
    #: Seconds for a message to arrive once it has begun, and for a client to read a response.
    message_timeout: _Seconds = 30.0


class Settings(SettingsTable, frozen=True):
    """Everything that can be set."""

    socket_path: AbsolutePath = DEFAULT_SOCKET
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
    """What a reload has changed, and the changes that wait for a restart."""

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
        match value:
            case msgspec.Struct():
                flat |= _flatten(value, f"{prefix}{name}.")
            case tuple():  # of users or groups
                flat[prefix + name] = tuple(each.as_given() for each in value)
            case _:
                flat[prefix + name] = value
    return flat


def parse(text: str, source: str) -> Settings:
    """Return the settings that a TOML text describes. Raises `SettingsError`, naming `source` and the key."""
    settings = settingsfile.decode(text, source, Settings, _CHOICES)
    size = len(settings.socket_path.encode())
    if size > MAX_SOCKET_PATH:
        raise SettingsError(f"{source}: socket_path: {size} bytes, expected {MAX_SOCKET_PATH} at most")
    return settings


def load(path: str | None = None) -> Settings:
    """Read `path`, or the default file if that exists, or take the defaults.

    Raises `SettingsError` if the file cannot be read or has a mistake.
    """
    text = settingsfile.read(path or DEFAULT_FILE, optional=path is None)
    return Settings() if text is None else parse(text, path or DEFAULT_FILE)


def file_read(path: str | None = None) -> str:
    """Return the absolute path of the file that `load` reads; empty if there is none."""
    if path is None and not os.path.exists(DEFAULT_FILE):
        return ""
    return os.path.abspath(path or DEFAULT_FILE)
