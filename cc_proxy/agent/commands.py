"""The commands a pod needs, as typed values (docs/protocol.md). No I/O.

Decoding is as strict as the real agent's: an unknown member is as wrong as one of the wrong type.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cc_proxy.agent.errors import CommandRefused
from cc_proxy.hyperstart.codes import Code

_NOT_EMPTY = Meta(min_length=1)
_MAX_SEQ = 2**64 - 1

#: Rows or columns of a terminal: what TIOCSWINSZ can hold.
_Cells = Annotated[int, Meta(ge=0, le=0xFFFF)]
_Name = Annotated[str, _NOT_EMPTY]


class _Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Common shape: immutable, camel case on the wire, no unknown members."""


class EnvVar(_Arguments, frozen=True):
    """One variable of a process's environment."""

    env: _Name
    value: str


class Rlimit(_Arguments, frozen=True):
    """One resource limit, by its name without `RLIMIT_` and in lower case."""

    type: str
    soft: int
    hard: int


class ProcessSpec(_Arguments, frozen=True):
    """What to run, and the streams it is connected to."""

    args: Annotated[list[str], _NOT_EMPTY]
    #: The seq of stdin, stdout and the exit status.
    stdio: int
    #: The seq of stderr; 0 if stderr goes to the terminal.
    stderr: int = 0
    terminal: bool = False
    envs: list[EnvVar] = []
    workdir: str = ""
    #: Names, or numbers in decimal; empty for the agent's own.
    user: str = ""
    group: str = ""
    additional_groups: list[str] = []
    rows: _Cells = 0
    columns: _Cells = 0
    rlimits: list[Rlimit] = []

    def __post_init__(self) -> None:
        """Check the seqs; msgspec makes its own error of the ValueError."""
        if not 0 < self.stdio <= _MAX_SEQ or not 0 <= self.stderr <= _MAX_SEQ:
            raise ValueError("not a stream number")
        if not self.terminal and not self.stderr:
            raise ValueError("stderr must not be 0 without a terminal")
        if self.stdio == self.stderr:
            raise ValueError("stdio and stderr are one stream")


class StartPod(_Arguments, frozen=True):
    """Begin a pod. The network settings mean nothing to processes of this host."""

    hostname: str = ""
    containers: list[Any] = []
    share_dir: str = ""
    interfaces: list[Any] = []
    routes: list[Any] = []
    dns: list[Any] = []
    portmapping_white_lists: Any = None


class NewContainer(_Arguments, frozen=True):
    """Begin a container with its first process."""

    id: _Name
    process: ProcessSpec
    rootfs: str = ""
    image: str = ""
    fsmap: list[Any] = []
    restart_policy: str = ""
    initialize: bool = False


class ExecCmd(_Arguments, frozen=True):
    """Run another process in a container."""

    container: str
    process: ProcessSpec


class KillContainer(_Arguments, frozen=True):
    """Send a signal to a container's first process, or to all of its processes."""

    container: str
    signal: Annotated[int, Meta(ge=0, le=64)]
    all_processes: bool = False


class WinSize(_Arguments, frozen=True):
    """Set the size of the terminal on a stream."""

    seq: int
    row: _Cells
    column: _Cells


class ReadFile(_Arguments, frozen=True):
    """Get the content of a file."""

    container: str
    file: _Name


class Version(_Arguments, frozen=True):
    """Ask for the version of this protocol."""


class Ping(_Arguments, frozen=True):
    """Ask for a sign of life."""


class DestroyPod(_Arguments, frozen=True):
    """End everything and power off."""


Command = StartPod | NewContainer | ExecCmd | KillContainer | WinSize | ReadFile | Version | Ping | DestroyPod

#: Commands whose payload is ignored.
_BARE: dict[int, Command] = {Code.VERSION: Version(), Code.PING: Ping(), Code.DESTROY_POD: DestroyPod()}

_DECODERS: dict[int, msgspec.json.Decoder[Command]] = {
    code: msgspec.json.Decoder(kind)
    for code, kind in (
        (Code.START_POD, StartPod),
        (Code.NEW_CONTAINER, NewContainer),
        (Code.EXEC_CMD, ExecCmd),
        (Code.KILL_CONTAINER, KillContainer),
        (Code.WINSIZE, WinSize),
        (Code.READ_FILE, ReadFile),
    )
}


def decode(code: int, payload: bytes) -> Command:
    """Return the command in a control message. Raises `CommandRefused` if it is unknown or wrong."""
    if code in _BARE:
        return _BARE[code]
    if code not in _DECODERS:
        raise CommandRefused("not a command for this agent")
    try:
        return _DECODERS[code].decode(payload)
    except (ValueError, RecursionError) as error:
        raise CommandRefused(str(error)) from None
