"""What the keeper keeps of one VM, and in which words of the VM's cell."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cc_proxy.continuity.cells import AT_NEXT_SEQ, AT_PROCESS, AT_RECEIVED, AT_SENT, AT_STATE, VM_WORDS, State
from cc_proxy.continuity.keeper import NOTHING, Keeper, Slot
from cc_proxy.continuity.memory import BUFFER_SIZE, Memory, private_memory, shared_memory
from cc_proxy.continuity.state.streams import SessionRecord
from cc_proxy.continuity.state.vms import GoneVmRecord, VmRecord
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.streams.session import Whose


class Facts(NamedTuple):
    """What does not change in a VM's life."""

    container_id: str
    owner: int
    created: float


class KeptVm:
    """One VM in the keeper's hands. One thread at a time until it is up; then any thread."""

    def __init__(self, keeper: Keeper = NOTHING) -> None:
        self._keeper = keeper
        self._slot = Slot()
        self._sessions: dict[int, Slot] = {}  # by stdio; adding, removing and looking up are atomic

    @property
    def number(self) -> int:
        """The number of its slot; 0 if it is not kept."""
        return self._slot.number

    def begin(self, facts: Facts, peers: Sequence[tuple[str, int]], fds: tuple[Fd, Fd, Fd | None]) -> Memory:
        """Begin to keep the VM; `fds` are those of its control channel, I/O channel and console.

        Returns the memory of its streams. Raises `OSError`.
        """
        control, io, console = fds
        memory = self._keeper.new_memory(2 * BUFFER_SIZE)
        if memory >= 0:
            record = VmRecord(
                **facts._asdict(),
                peers=list(peers),
                control=control,
                io=io,
                console=console,
                memory=Fd(memory),
            )
            self._slot = self._keeper.keep(record, memory)
        return shared_memory(memory, self._slot.cell[:VM_WORDS]) if self.number else private_memory()

    def keep_session(self, seqs: range, fd: int, whose: Whose) -> Slot:
        """Keep one of its sessions, if the VM is kept."""
        if not self.number:
            return Slot()
        slot = self._sessions[seqs.start] = self._keeper.keep(
            SessionRecord(
                fd=Fd(fd), vm=self.number, first_seq=seqs.start, seqs=len(seqs), uid=whose.uid, pid=whose.pid
            )
        )
        return slot

    def release_session(self, seqs: range, slot: Slot) -> None:
        """Stop keeping a session."""
        self._sessions.pop(seqs.start, None)
        slot.release()

    def note_processes(self, seqs: Iterable[int], how_far: int) -> None:
        """Note that processes on these stdios are `PROCESS_COMMANDED` or `PROCESS_STARTED`."""
        for slot in filter(None, map(self._sessions.get, seqs)):
            slot.cell[AT_PROCESS] = how_far

    @property
    def control(self) -> memoryview:
        """The words of its control channel."""
        return self._slot.cell[AT_RECEIVED : AT_SENT + 1]

    def note_state(self, state: State) -> None:
        """Note the VM's state, one that comes after STARTING. Only `Life` calls this and `note_next_seq`."""
        # LEAVING stays: the next process would give an id to a VM that is LOST, and this one has none.
        if self._slot.cell[AT_STATE] != State.LEAVING.value:
            self._slot.cell[AT_STATE] = state.value

    def note_next_seq(self, seq: int) -> None:
        """Note that all seqs before this one have been handed out."""
        self._slot.cell[AT_NEXT_SEQ] = seq

    def be_gone(self, facts: Facts, cause: str) -> None:
        """Note that the VM has gone and keeps its id."""
        before = self._slot
        self._slot = self._keeper.keep(GoneVmRecord(**facts._asdict(), cause=cause, before=before.number))
        before.release()

    def release(self) -> None:
        """Stop keeping the VM, if it is kept."""
        self._slot.release()
