"""After a crash: the same value that the process would have handed over, made from what it left.

Nothing is read from or written to an fd here, but sockets are asked how much waits in them.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from cc_proxy.api import messages
from cc_proxy.api.fdpassing import TAG
from cc_proxy.api.payloads import Response
from cc_proxy.continuity.cells import (
    AT_NEXT_SEQ,
    AT_PHASE,
    AT_PROCESS,
    AT_RECEIPT,
    AT_RECEIVED,
    AT_SENT,
    AT_STATE,
    AT_VM,
    EXPECTED,
    FINISH_AT,
    FLAGS,
    PROCESS_COMMANDED,
    PROCESS_STARTED,
    STARTED,
    VM_WORDS,
    Cell,
    Phase,
    State,
)
from cc_proxy.continuity.format import (
    CLOSED,
    AnyRecord,
    DaemonRecord,
    DaemonState,
    Found,
    check_version,
    decode_settings,
    take,
    take_record,
)
from cc_proxy.continuity.memory import shared_memory
from cc_proxy.continuity.regain import ChannelFacts, Gap, Regained, SessionFacts, regain
from cc_proxy.continuity.state.clients import ConnectionRecord, ConnectionState, ServerState
from cc_proxy.continuity.state.streams import SessionRecord
from cc_proxy.continuity.state.vms import (
    ConsoleState,
    ControlState,
    GoneVmRecord,
    LifeState,
    RegistryState,
    VmRecord,
    VmState,
)
from cc_proxy.continuity.table import Entry, Table
from cc_proxy.hyperstart.control import state_at
from cc_proxy.hyperstart.state import ControlChannelState
from cc_proxy.linux.fds import Fd, unread
from cc_proxy.linux.receipt import taken
from cc_proxy.settings import Settings

#: The flags of a session's streams that `AT_PROCESS` implies, even if the pump did not know them yet.
_PROCESSES = {0: 0, PROCESS_COMMANDED: EXPECTED, PROCESS_STARTED: EXPECTED | STARTED}
#: The response to a request that had no answer yet.
_LOST_ANSWER = messages.encode(
    Response(False, "cc-proxy was killed before it answered: whether the request was carried out is unknown")
)
_LINGERED = "it has lingered long enough after bye"
_CUT = "a command to it was cut in two when cc-proxy was killed"
_NO_ANSWER = "cc-proxy was killed while it answered a request"
_HELLO = "cc-proxy was killed before its hello was answered"
_LOST = "it was lost, or its pump hung, before cc-proxy was killed"


@dataclass
class Losses:
    """What could not be saved."""

    #: Each with the id of its VM.
    gaps: list[tuple[str, Gap]] = field(default_factory=list)
    #: Fds whose peers are to be hung up on, each with the fields of its log line.
    hung_up: list[tuple[Fd, dict[str, object]]] = field(default_factory=list)
    #: Fds that are not needed any more.
    unused: list[Fd] = field(default_factory=list)


def recover(table: Table, found: Found) -> tuple[DaemonState, Losses]:
    """Return the state of the daemon, and what of it is lost. Takes the fds that it names out of `found`.

    Raises `Unreadable`.
    """
    check_version(table.daemon)
    daemon = take(table.daemon, DaemonRecord, found)
    everything = ((entry, take_record(entry.record, found)) for entry in table.entries())
    parts = [(entry, record) for entry, record in everything if not _is_over(record)]
    losses = Losses()
    vms = _Vms(decode_settings(daemon.settings) or Settings(), losses)
    vms.recover(parts)
    connections = list(_connections(parts, vms.numbers, losses))
    state = DaemonState(
        program=daemon.program,
        rested_at=time.monotonic(),
        settings=daemon.settings,
        log_level=daemon.log_level,
        known_since=daemon.known_since,
        replaced=replace(daemon.replaced, crashes=daemon.replaced.crashes + 1, last="crash"),
        gaps=daemon.gaps,
        faults={},
        users={},
        registry=RegistryState(vms=vms.states, by_id=vms.by_id, hellos=[], failed=[]),
        server=ServerState(
            listener=daemon.listener,
            connections=connections,
            next_number=1 + max((each.number for each in connections), default=0),
        ),
    )
    return state, losses


def _is_over(record: AnyRecord) -> bool:
    """Whether the process was killed as it ended this part, and had closed its fd already."""
    return isinstance(record, SessionRecord | ConnectionRecord) and record.fd is CLOSED


_Parts = Sequence[tuple[Entry, AnyRecord]]


class _Vms:
    """Recovers the VMs, one after the other."""

    def __init__(self, settings: Settings, losses: Losses) -> None:
        self._settings = settings
        self._losses = losses
        self.states: list[VmState] = []
        self.by_id: dict[str, int] = {}
        #: The index of each VM in `states`, by the number of its slot.
        self.numbers: dict[int, int] = {}

    def recover(self, parts: _Parts) -> None:
        """Recover all VMs and their sessions."""
        sessions: dict[int, list[SessionFacts]] = {}
        for entry, record in parts:
            if isinstance(record, SessionRecord):
                entry.cell[FLAGS] |= _PROCESSES[entry.cell[AT_PROCESS]]
                facts = SessionFacts(
                    record.fd, record.first_seq, record.seqs, record.uid, record.pid, entry.cell
                )
                sessions.setdefault(record.vm, []).append(facts)
        for entry, record in parts:
            if isinstance(record, VmRecord):
                self._recover(entry, record, sessions.pop(entry.number, []))
            elif isinstance(record, GoneVmRecord):
                self._add(entry, _gone(record, record.cause), has_id=True)
                if record.before:
                    self.numbers[record.before] = self.numbers[entry.number]
        for facts in (each for some in sessions.values() for each in some):
            self._hang_up(facts.fd, "", facts.first_seq, "its VM has gone")

    def _recover(self, entry: Entry, record: VmRecord, sessions: list[SessionFacts]) -> None:
        state = State(entry.cell[AT_STATE] or State.STARTING.value)
        is_open = CLOSED not in (record.control, record.io, record.memory)
        if is_open and state in (State.UP, State.LEAVING):
            self._add(entry, self._up(entry, record, state, sessions), has_id=state is State.UP)
            return
        why = _HELLO if state is State.STARTING else _LOST
        for fd in filter(None, (record.control, record.io, record.console)):
            self._hang_up(fd, record.container_id, None, why)
        for facts in sessions:
            self._hang_up(facts.fd, record.container_id, facts.first_seq, why)
        self._drop(record.memory)
        if state is not State.STARTING:
            self._add(entry, _gone(record, why), has_id=state is not State.LEAVING)

    def _add(self, entry: Entry, state: VmState, *, has_id: bool) -> None:
        self.numbers[entry.number] = len(self.states)
        if has_id:
            self.by_id[state.container_id] = len(self.states)
        self.states.append(state)

    def _up(self, entry: Entry, record: VmRecord, state: State, sessions: list[SessionFacts]) -> VmState:
        next_seq = max(1, entry.cell[AT_NEXT_SEQ])
        facts = ChannelFacts(
            io=record.io,
            memory=shared_memory(record.memory.number, entry.cell[:VM_WORDS]),
            sessions=sessions,
            next_seq=next_seq,
            window=self._settings.stdin.window,
            finish_in=self._left_to_linger(entry.cell) if state is State.LEAVING else None,
            finish_cause=_LINGERED if state is State.LEAVING else "",
        )
        regained = regain(facts)
        self._note(record, regained)
        cause = regained.lost or (_CUT if entry.cell[AT_SENT] else "")
        if cause:  # without its control channel the VM is lost as soon as its pump has begun
            self._hang_up(record.control, record.container_id, None, cause)
        return VmState(
            container_id=record.container_id,
            owner=record.owner,
            age=time.monotonic() - record.created,
            life=LifeState(state.name, cause, None, failed=False, came_up=True, ends=0),
            next_seq=next_seq,
            peers=record.peers,
            boot=None,
            control=None if cause else _control(record.control, entry),
            console=_console(record.console),
            channel=regained.state,
        )

    def _left_to_linger(self, cell: Cell) -> float:
        """Return how long a VM may still linger after bye: all the time, if its pump did not know yet."""
        finish_at = cell[FINISH_AT]
        return finish_at / 1e9 - time.monotonic() if finish_at else self._settings.vm.bye_linger

    def _note(self, record: VmRecord, regained: Regained) -> None:
        self._losses.gaps += [(record.container_id, gap) for gap in regained.gaps]
        self._drop(record.memory)
        for facts, why in regained.hung_up:
            self._hang_up(facts.fd, record.container_id, facts.first_seq, why)

    def _hang_up(self, fd: Fd, vm: str, stream: int | None, why: str) -> None:
        if fd is not CLOSED:
            self._losses.hung_up.append((fd, {"vm": vm, "stream": stream, "reason": why}))

    def _drop(self, fd: Fd) -> None:
        if fd is not CLOSED:
            self._losses.unused.append(fd)


def _gone(record: VmRecord | GoneVmRecord, cause: str) -> VmState:
    """Return a VM of which only the id is left."""
    return VmState(
        container_id=record.container_id,
        owner=record.owner,
        age=time.monotonic() - record.created,
        life=LifeState(State.GONE.name, cause, None, failed=False, came_up=True, ends=0),
        next_seq=1,
        peers=[],
        boot=None,
        control=None,
        console=None,
        channel=None,
    )


def _control(fd: Fd, entry: Entry) -> ControlState:
    """Return a control channel. Which commands have no answer yet is not known; the new process finds out."""
    parser = state_at(entry.cell[AT_RECEIVED])
    channel = ControlChannelState(parser=parser, outgoing=b"", quiz=None, ready=False, is_up=False)
    return ControlState(fd=fd, channel=channel, commands=[], requests=[])


def _console(fd: Fd | None) -> ConsoleState | None:
    return ConsoleState(fd, b"", "") if fd and fd is not CLOSED else None


def _connections(parts: _Parts, vms: Mapping[int, int], losses: Losses) -> Iterable[ConnectionState]:
    """Yield the connections; a client that waits for an answer is told that it is lost."""
    for entry, record in parts:
        if not isinstance(record, ConnectionRecord):
            continue
        phase = _phase(entry.cell, record.fd)
        if phase is Phase.BETWEEN:
            losses.hung_up.append((record.fd, {"client": record.number, "reason": _NO_ANSWER}))
            continue
        yield ConnectionState(
            fd=record.fd,
            number=record.number,
            vm=vms.get(entry.cell[AT_VM]),
            unread=b"",
            text=None,
            delay=0.0,
            unsent=_LOST_ANSWER if phase is Phase.ASKED else b"",
            passed=None,
            left=None,
            counted=0,
        )


def _phase(cell: Cell, fd: Fd) -> Phase:
    """Return a connection's phase: SILENT, ASKED or BETWEEN."""
    phase = Phase(cell[AT_PHASE])
    if phase is Phase.READING:
        return Phase.SILENT if unread(fd.number) else Phase.ASKED
    if phase is Phase.SENDING:
        return Phase.SILENT if taken(cell[AT_RECEIPT]) else Phase.ASKED
    if phase is Phase.PASSING:
        return {0: Phase.ASKED, len(TAG): Phase.SILENT}.get(taken(cell[AT_RECEIPT]), Phase.BETWEEN)
    return phase
