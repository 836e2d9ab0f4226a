"""What is remembered of VMs that have gone, within limits."""

from collections import Counter, deque
from typing import NamedTuple, Self, TypeVar

from cc_proxy.continuity.state.vms import FailedVmState
from cc_proxy.proxy.vms.states import Trouble
from cc_proxy.proxy.vms.vm import Vm


class FailedVm(NamedTuple):
    """What is remembered of a VM that failed."""

    container_id: str
    owner: int
    trouble: Trouble

    @classmethod
    def from_state(cls, state: FailedVmState) -> Self:
        """Return what the process before remembered."""
        return cls(state.container_id, state.owner, Trouble.from_state(state.trouble))

    def state(self) -> FailedVmState:
        """Return it as a value, for `from_state`."""
        return FailedVmState(self.container_id, self.owner, self.trouble.state())


T = TypeVar("T", FailedVm, Vm)


def drop_one_over(vms: deque[T], most: int) -> T | None:
    """Drop the oldest VM of the user who has most, if there are more than `most`; returns it."""
    if len(vms) <= most:
        return None
    [(owner, _)] = Counter(vm.owner for vm in vms).most_common(1)
    oldest = next(vm for vm in vms if vm.owner == owner)
    vms.remove(oldest)
    return oldest
