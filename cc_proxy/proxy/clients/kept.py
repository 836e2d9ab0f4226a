"""What is kept of a connection outside of the process, and where in its cell it is."""

from enum import IntEnum

from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.clients.handlers import ClientInfo, failure
from cc_proxy.proxy.clients.state import ConnectionRecord
from cc_proxy.proxy.keeping import NOWHERE, Keeper, Slot
from cc_proxy.proxy.vms.vm import Vm

#: Words of a connection's cell: its phase, and the number by which the VM is kept that it is attached to.
AT_PHASE, AT_VM = 0, 1

#: What a client is told whose request had no answer yet.
LOST_ANSWER = failure(
    "cc-proxy was killed before it answered: whether the request was carried out is unknown"
).message


class Phase(IntEnum):
    """What is known of a connection at a moment."""

    #: Every request that has been read is answered.
    SILENT = 0
    #: One request has been read whole, and nothing behind it; nothing of its response has been sent.
    ASKED = 1
    #: Anything else: nobody can say what the client has yet to get.
    BETWEEN = 2
    #: Something has come and is being read: it is either in the socket still, or one request has been read.
    READING = 3
    #: The last of a response is being sent. Its client is woken by that, and may well run before this process
    #: does again; before it, there is hardly a microsecond. So it counts as sent.
    SENDING = 4


class KeptConnection:
    """One connection in the keeper's hands. For the thread that serves it."""

    def __init__(self, keeper: Keeper, client: ClientInfo) -> None:
        self._keeper = keeper
        self._client = client
        self._slot: Slot | None = None
        self._vm: Vm | None = None
        #: Its words: the phase is set where it changes.
        self.cell = NOWHERE

    def begin(self, fd: int, phase: Phase) -> None:
        """Keep it from now on. No matter if it is kept."""
        if self._slot is None:
            self._vm = self._client.vm
            words = (phase, self._vm.kept.number if self._vm else 0)
            record = ConnectionRecord(fd=Fd(fd), number=self._client.number)
            self._slot = self._keeper.keep(record, words=words)
            self.cell = self._slot.cell

    def note_vm(self) -> None:
        """It may be attached to another VM now."""
        vm = self._client.vm
        if vm is not self._vm:
            self._vm = vm
            self.cell[AT_VM] = vm.kept.number if vm else 0

    def end(self) -> None:
        """It is about to be closed."""
        self.cell = NOWHERE
        if self._slot:
            self._slot.release()
