"""What the keeper keeps of one connection, and in which words of its cell."""

from cc_proxy.continuity.cells import AT_RECEIPT, AT_VM, NO_CELL, Phase
from cc_proxy.continuity.keeper import Keeper, Slot
from cc_proxy.continuity.state.clients import ConnectionRecord
from cc_proxy.linux import receipt
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.clients.handlers import ClientInfo
from cc_proxy.proxy.vms.vm import Vm


class KeptConnection:
    """One connection in the keeper's hands. Only the thread that serves it calls this."""

    def __init__(self, keeper: Keeper, client: ClientInfo) -> None:
        self._keeper = keeper
        self._client = client
        self._slot: Slot | None = None
        self._vm: Vm | None = None
        #: Its words. The code that changes the phase stores it there.
        self.cell = NO_CELL
        #: For its responses; None if the connection is not kept, or receipts do not work on this machine.
        self.receipt: receipt.Receipt | None = None

    def begin(self, fd: int, phase: Phase) -> None:
        """Begin to keep the connection, unless it is kept already."""
        if self._slot is None:
            self._vm = self._client.vm
            words = (phase, self._vm.kept.number if self._vm else 0)
            record = ConnectionRecord(fd=Fd(fd), number=self._client.number)
            self._slot = self._keeper.keep(record, words=words)
            self.cell = self._slot.cell
            if self._slot.number and receipt.FITS:
                self.receipt = receipt.Receipt(self.cell[AT_RECEIPT])

    def note_vm(self) -> None:
        """Store which VM the connection is attached to, if that has changed."""
        vm = self._client.vm
        if vm is not self._vm:
            self._vm = vm
            self.cell[AT_VM] = vm.kept.number if vm else 0

    def end(self) -> None:
        """Stop keeping the connection, which is about to be closed."""
        self.cell, self.receipt = NO_CELL, None
        if self._slot:
            self._slot.release()
