"""The VMs that clients have registered, by their ids."""

import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from cc_proxy.access import is_admin, may_use
from cc_proxy.api.payloads import Hello
from cc_proxy.api.status import MOST_ENDED, MOST_USERS, UserStatus, shorten
from cc_proxy.continuity.cells import State
from cc_proxy.continuity.keeper import NOTHING, Keeper
from cc_proxy.continuity.state.vms import FailedVmState, HelloState, RegistryState
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import logger
from cc_proxy.proxy.rest import Resting
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.users import Charge, User, Users
from cc_proxy.proxy.vms.connector import Connector
from cc_proxy.proxy.vms.dialer import Dialer, Peer
from cc_proxy.proxy.vms.kept import Facts
from cc_proxy.proxy.vms.states import FailedVm, Trouble, VmError
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import LiveSettings

#: The longest id, in characters, that outlives its VM. Clients in the field use 64.
_LONGEST_KEPT = 4_096


class RegistryError(Exception):
    """An id is taken or unknown; the text is what clients are told."""


class Registry:
    """All VMs of the daemon. Any thread may call.

    A VM that goes without bye keeps its id until somebody says bye or hello for it, because runtimes delete
    a container by its name after its VM has powered off. To a client, a VM that it may not use looks like
    one that does not exist.
    """

    def __init__(
        self,
        live: LiveSettings,
        connector: Connector,
        own_address: str | bytes | None = None,
        keeper: Keeper = NOTHING,
    ) -> None:
        """`own_address` is the address of the daemon's own socket, which cannot be a VM's."""
        self._keeper = keeper
        self._live = live
        self._connector = connector
        self._own_address = own_address
        self._space = SpoolSpace(live)
        #: The users, and what each of them has.
        self.users = Users(live)
        self._lock = threading.Lock()  # guards all that follows, and `Vm.peers`; innermost
        self._by_id: dict[str, Vm] = {}  # from the beginning of hello until bye, even if the VM has gone
        self._vms: dict[Vm, list[Charge]] = {}  # VMs that have not gone, and their charges
        self._failed: deque[FailedVm] = deque()  # the latest last
        # Hellos that came to rest, by their clients' numbers: the VM, and the one that had its id before.
        # Each client's thread adds and removes its own, which is atomic under the GIL.
        self._hellos: dict[int, tuple[Vm, Vm | None]] = {}

    # Between two processes --------------------------------------------------------------------------------

    def rest(self) -> None:
        """Have clients' threads raise `Resting`. Call it until all have: a hello may just be beginning."""
        for vm in self.vms():
            vm.rest()

    def rest_pumps(self, timeout: float) -> list[Vm]:
        """End the pumps' threads after their current turns; returns VMs whose thread did not end in time."""
        vms, deadline = self.vms(), time.monotonic() + timeout
        for vm in vms:
            vm.rest_pump()
        return [vm for vm in vms if not vm.join(max(0.0, deadline - time.monotonic()))]

    def hand_over(self, attached: Iterable[Vm]) -> tuple[RegistryState, dict[Vm, int]]:
        """Give up all VMs as a value, for `restore`, including those that clients are attached to.

        Returns the value, and each VM's number in it. Nobody may use any of them any more.
        """
        waiting = filter(None, (before for _, before in self._hellos.values()))
        vms = list(dict.fromkeys([*self._vms, *self._by_id.values(), *attached, *waiting]))
        numbers = {vm: number for number, vm in enumerate(vms)}
        state = RegistryState(
            vms=[vm.hand_over() for vm in vms],
            by_id={container_id: numbers[vm] for container_id, vm in self._by_id.items()},
            hellos=[
                HelloState(client, numbers[vm], numbers[before] if before else None)
                for client, (vm, before) in self._hellos.items()
            ],
            failed=[
                FailedVmState(each.container_id, each.owner, each.trouble.state()) for each in self._failed
            ],
        )
        return state, numbers

    def restore(self, state: RegistryState) -> list[Vm]:
        """Go on with the VMs of the previous process; returns all, in the state's order. Raises `OSError`.

        Call this before anything else, and `go_on` next.
        """
        vms = [self._new_vm(each.container_id, each.owner) for each in state.vms]
        self._by_id = {container_id: vms[number] for container_id, number in state.by_id.items()}
        for vm, each in zip(vms, state.vms, strict=True):
            vm.restore(each, self.users)
            if vm.life.state is not State.GONE:
                charge = self.users.of(vm.owner).charge_again
                self._vms[vm] = [charge("vms"), charge("request_bytes", len(vm.container_id))]
            self._settle(vm)
        for hello in state.hellos:
            before = None if hello.before is None else vms[hello.before]
            self._hellos[hello.client] = vms[hello.vm], before
        self._failed.extend(
            FailedVm(each.container_id, each.owner, Trouble.from_state(each.trouble)) for each in state.failed
        )
        return vms

    def go_on(self) -> None:
        """Start the pumps of the VMs that were restored."""
        for vm in self.vms():
            vm.go_on()

    # Any thread -------------------------------------------------------------------------------------------

    def register(
        self, hello: Hello, client: Credentials, is_here: Callable[[], bool] = lambda: True, number: int = 0
    ) -> Vm:
        """Register the VM behind two sockets for a client; returns once the VM is up.

        The id is taken from the beginning, and free again if this fails. While sockets do not exist yet, this
        tries again as long as `is_here` says that the client still waits. If the client has gone by the time
        the VM is up, the VM is let go as after bye. Raises `RegistryError`, `LimitReached` or `VmError`. If
        it raises `Resting`, the client with the same `number` has to call it again.
        """
        user = self.users.of(client.uid)
        resumed = self._hellos.pop(number, None)
        vm, before = resumed or self._enter(hello.container_id, client, user)
        claim = functools.partial(self._claim, vm, client)
        dialer = Dialer(client, self._connector, self._own_address, claim)
        try:
            vm.start(hello, dialer, user, is_here)
            if not is_here():  # nobody is told that it is registered, so nobody would say bye
                self.unregister(hello.container_id, client)
                raise VmError("nobody waits for it any more")
        except Resting:
            self._hellos[number] = vm, before
            raise
        except BaseException as error:
            if before:
                with self._lock:
                    self._by_id.setdefault(before.container_id, before)
            if isinstance(error, VmError):
                fields = {"vm": hello.container_id, "uid": client.uid, "error": str(error)}
                logger.warning("VM not registered", extra=fields)
            raise
        if before:
            self._settle(before)
        return vm

    def _new_vm(self, container_id: str, owner: int) -> Vm:
        return Vm(container_id, owner, self._live, self._space, self._on_change, self._keeper)

    def _enter(self, container_id: str, client: Credentials, user: User) -> tuple[Vm, Vm | None]:
        """Take an id for a new VM, and charge its user. Returns that VM, and the one that had the id, if any.

        Raises `RegistryError` or `LimitReached`; nothing is taken then.
        """
        vm, taken = self._new_vm(container_id, client.uid), f"{container_id}: container already registered"
        with self._lock:
            before = self._by_id.get(container_id)
        # A VM that has gone leaves its id only to those who could say bye for it, since a client that
        # attaches by name trusts the name. Before the charges: a user at a limit should still be told.
        if before and not (before.life.is_gone and self._may_use(client, before.owner)):
            raise RegistryError(taken)
        charges = [user.charge("vms")]
        try:
            charges.append(user.charge("request_bytes", len(container_id)))
            with self._lock:
                if self._by_id.get(container_id) is not before:
                    raise RegistryError(taken)
                self._vms[vm] = charges
                self._by_id[container_id] = vm
        except BaseException:
            with self._lock:
                self._vms.pop(vm, None)
            for charge in charges:
                charge.give_back()
            raise
        return vm, before

    def _claim(self, vm: Vm, client: Credentials, peer: Peer) -> str:
        """Claim a peer for a VM; returns why that is not possible, empty if it is.

        A hypervisor serves one connection at a time, so a second VM would wait in vain while another one is
        connected there. One that lingers after bye does not count: it will let go soon.
        """
        with self._lock:
            if peer in vm.peers:
                return "it is the VM's other channel too"
            holders = (
                other
                for other in self._vms
                if other is not vm and peer in other.peers and other.life.state in (State.STARTING, State.UP)
            )
            holder = next(holders, None)
            if holder is None:
                vm.peers.add(peer)
                return ""
        if self._may_use(client, holder.owner):
            return f"the VM '{shorten(holder.container_id)}' has it already"
        return "it is in use already"

    def get(self, container_id: str, client: Credentials) -> Vm:
        """Return the VM registered under an id, unless it is still starting. Raises `RegistryError`."""
        with self._lock:
            vm = self._by_id.get(container_id)
        if vm is None or vm.life.state is State.STARTING or not self._may_use(client, vm.owner):
            raise RegistryError(f"unknown containerID: {container_id}")
        return vm

    def unregister(self, container_id: str, client: Credentials) -> None:
        """Free an id and let its VM go. Raises `RegistryError`."""
        vm = self.get(container_id, client)
        with self._lock:
            if self._by_id.get(container_id) is not vm:  # another client was faster
                raise RegistryError(f"unknown containerID: {container_id}")
            del self._by_id[container_id]
        vm.leave()
        self._settle(vm)
        logger.info("VM unregistered", extra={"vm": container_id})

    def vms(self) -> list[Vm]:
        """Return all VMs that have not gone, including those without an id."""
        with self._lock:
            return list(self._vms)

    def vms_of(self, client: Credentials) -> list[Vm]:
        """Return the VMs that a client may use, including those that have gone but keep their ids."""
        with self._lock:
            vms = {*self._vms, *self._by_id.values()}
        return [vm for vm in vms if self._may_use(client, vm.owner)]

    def _may_use(self, client: Credentials, owner: int) -> bool:
        return client.uid == owner or may_use(self._live.current.access, client, owner)

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be taken within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free

    def failed(self, client: Credentials) -> list[FailedVm]:
        """Return the failed VMs that a client was allowed to use, the latest first."""
        with self._lock:
            failed = list(reversed(self._failed))
        return [ended for ended in failed if self._may_use(client, ended.owner)]

    def spooled(self, client: Credentials) -> int:
        """Return the bytes that wait on disk: all of them for an admin, or those of the client's user."""
        everything = is_admin(self._live.current.access, client)
        return self._space.used if everything else self._space.used_by(client.uid)

    def user_status(self, client: Credentials) -> list[UserStatus]:
        """Return what each user has, for an admin; otherwise what the client's user has."""
        everybody = is_admin(self._live.current.access, client)
        return [
            UserStatus(
                uid=user.uid,
                connections=user.has["connections"],
                vms=user.has["vms"],
                sessions=user.has["sessions"],
                commands=user.has["commands"],
                spooled=self._space.used_by(user.uid),
            )
            for user in self.users.all()
            if everybody or user.uid == client.uid
        ][:MOST_USERS]

    def _on_change(self, vm: Vm, state: State) -> None:
        """A VM has moved to another state. Calls may overlap, and come in any order."""
        if state is State.UP and vm.life.state is State.UP:
            logger.info("VM registered", extra={"vm": vm.container_id, "uid": vm.owner})
        if state is not State.GONE:
            return
        with self._lock:
            charges = self._vms.pop(vm, [])
            keeps_id = vm.life.came_up and len(vm.container_id) <= _LONGEST_KEPT
            if not keeps_id and self._by_id.get(vm.container_id) is vm:
                del self._by_id[vm.container_id]
            if vm.life.failed and vm.life.trouble:
                self._failed.append(FailedVm(vm.container_id[:_LONGEST_KEPT], vm.owner, vm.life.trouble))
                _drop_one_over(self._failed, MOST_ENDED)
            forgotten = self._forget_gone()
        for over in filter(None, (vm, forgotten)):
            self._settle(over)
        for charge in charges:
            charge.give_back()

    def _settle(self, vm: Vm) -> None:
        """Once a VM has gone, keep nothing of it but its id, and that only as long as it has one."""
        if vm.life.state is not State.GONE:
            return
        if self._by_id.get(vm.container_id) is vm:
            vm.kept.be_gone(Facts(vm.container_id, vm.owner, vm.created), vm.life.cause)
        if self._by_id.get(vm.container_id) is not vm:  # which may have changed meanwhile
            vm.kept.release()

    def _forget_gone(self) -> Vm | None:
        """Limit the ids of VMs that have gone to the number of VMs allowed. Requires _lock.

        Returns the VM that has lost its id.
        """
        gone = deque(vm for vm in self._by_id.values() if vm.life.state is State.GONE)
        if (forgotten := _drop_one_over(gone, self._live.current.limits.vms)) is not None:
            del self._by_id[forgotten.container_id]
        return forgotten


T = TypeVar("T", FailedVm, Vm)


def _drop_one_over(vms: deque[T], most: int) -> T | None:
    """If there are more VMs than `most`, drop the oldest of the user who has the most; returns it."""
    if len(vms) <= most:
        return None
    [(owner, _)] = Counter(vm.owner for vm in vms).most_common(1)
    oldest = next(vm for vm in vms if vm.owner == owner)
    vms.remove(oldest)
    return oldest
