"""The VMs as values, for another process to go on with.

A time is the number of seconds that are left, or an age in seconds.
"""

from msgspec import Struct

from cc_proxy.continuity.state import Record
from cc_proxy.continuity.state.streams import ChannelState
from cc_proxy.hyperstart.state import ControlChannelState
from cc_proxy.linux.fds import Fd


class CommandState(Struct, frozen=True):
    """A command that has been sent and has no answer yet."""

    code: int
    #: The seqs of the processes that it starts.
    starts: list[int]
    #: Whether the daemon sent it for itself, and not for a client.
    posted: bool


class RequestState(Struct, frozen=True):
    """A command that a client waits for."""

    client: int
    code: int
    payload: bytes
    age: float
    starts: list[int]
    #: Its index in `ControlState.commands`; None if it has not been sent yet.
    sent: int | None


class ControlState(Struct, frozen=True):
    """`ControlLink`."""

    fd: Fd
    channel: ControlChannelState
    commands: list[CommandState]
    #: In the order of their turns.
    requests: list[RequestState]


class ConsoleState(Struct, frozen=True):
    """`Console`: `line` is what has come of an unfinished line."""

    fd: Fd
    line: bytes
    last: str


class BootState(Struct, frozen=True):
    """`Boot`: a hello that is not answered yet. If it has no sockets, the next process connects them."""

    left: float
    quizzed_in: float
    io: Fd | None
    control: ControlState | None
    console: ConsoleState | None


class TroubleState(Struct, frozen=True):
    """`Trouble`."""

    text: str
    age: float


class LifeState(Struct, frozen=True):
    """`Life`."""

    state: str
    cause: str
    trouble: TroubleState | None
    failed: bool
    came_up: bool
    ends: int


class VmState(Struct, frozen=True):
    """`Vm`."""

    container_id: str
    owner: int
    age: float
    life: LifeState
    next_seq: int
    peers: list[tuple[str, int]]
    boot: BootState | None
    #: Each None if it is closed.
    control: ControlState | None
    console: ConsoleState | None
    #: None if the VM has no pump yet, or has gone.
    channel: ChannelState | None


class HelloState(Struct, frozen=True):
    """A hello that is not answered yet: the client, its VM, and the one that had the id before."""

    client: int
    vm: int
    before: int | None


class FailedVmState(Struct, frozen=True):
    """`FailedVm`."""

    container_id: str
    owner: int
    trouble: TroubleState


class RegistryState(Struct, frozen=True):
    """`Registry`. A VM is named by its index in `vms`."""

    vms: list[VmState]
    by_id: dict[str, int]
    hellos: list[HelloState]
    failed: list[FailedVmState]


class VmRecord(Record, frozen=True, tag=1):
    """A VM that is up. `created` is a moment (CLOCK_MONOTONIC), `memory` what its pump reads into."""

    container_id: str
    owner: int
    created: float
    peers: list[tuple[str, int]]
    control: Fd
    io: Fd
    console: Fd | None
    memory: Fd


class GoneVmRecord(Record, frozen=True, tag=2):
    """A VM that has gone without bye, and keeps its id.

    `before` is the number of its slot while it was up, by which attached connections name it; 0 if it had
    none.
    """

    container_id: str
    owner: int
    created: float
    cause: str
    before: int = 0
