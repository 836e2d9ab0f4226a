"""Which VMs there are: ids, and the VMs that clients have registered under them."""

import functools
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from cc_proxy.access import is_admin, may_use
from cc_proxy.api.payloads import Hello
from cc_proxy.api.status import MOST_USERS, UserStatus, shorten
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.users import Charge, User, Users
from cc_proxy.proxy.vms.connector import Connector
from cc_proxy.proxy.vms.dialer import Dialer, Peer
from cc_proxy.proxy.vms.states import State, Trouble
from cc_proxy.proxy.vms.vm import Vm, VmError
from cc_proxy.settings import LiveSettings

#: VMs that failed, of which `status` tells the last error.
_MOST_FAILED = 32
#: Longest id, in characters, that is kept after its VM has gone. Clients in the field use 64.
_LONGEST_KEPT = 4_096


class RegistryError(Exception):
    """An id that is taken, or unknown; the text is what clients are told."""


class FailedVm(NamedTuple):
    """What is left of a VM that failed."""

    container_id: str
    owner: int
    trouble: Trouble


T = TypeVar("T", FailedVm, Vm)


class Registry:
    """All VMs of the daemon. Any thread may call.

    A VM that goes without bye keeps its id until somebody says bye or hello for it: runtimes delete a
    container by its name after its VM has powered off. A client that asks for a VM it may not use is told
    what it would be told if there were none.
    """

    def __init__(
        self, live: LiveSettings, connector: Connector, own_address: str | bytes | None = None
    ) -> None:
        """`own_address` is what the daemon's listening socket was bound to: no VM is there."""
        self._live = live
        self._connector = connector
        self._own_address = own_address
        self._space = SpoolSpace(live)
        #: What each user has.
        self.users = Users(live)
        self._lock = threading.Lock()  # guards all that follows; innermost
        self._by_id: dict[str, Vm] = {}  # from the beginning of hello until bye; also VMs that have gone
        self._vms: dict[Vm, list[Charge]] = {}  # those that have not gone, and what they count for
        self._failed: deque[FailedVm] = deque()  # the latest last

    def register(self, hello: Hello, client: Credentials, is_here: Callable[[], bool] = lambda: True) -> Vm:
        """Register the VM behind two sockets as the client's; returns once it is up.

        The id is taken from the beginning, and free again if this fails. Sockets that are not there yet are
        looked for again as long as `is_here` says that the client still waits; if it does not in the end, the
        VM is let go as after bye. Raises `RegistryError`, `LimitReached` or `VmError`.
        """
        user = self.users.of(client.uid)
        vm = Vm(hello.container_id, client.uid, self._live, self._space, self._on_change)
        before = self._enter(vm, client, user)
        try:
            claim = functools.partial(self._claim, vm, client)
            vm.start(hello, Dialer(client, self._connector, self._own_address, is_here, claim), user)
            if not is_here():  # nobody is told that it is registered, so nobody would say bye
                self.unregister(hello.container_id, client)
                raise VmError("nobody waits for it any more")
        except BaseException as error:
            self._leave_to(before)
            if isinstance(error, VmError):
                fields = {"vm": hello.container_id, "uid": client.uid, "error": str(error)}
                logger.warning("VM not registered", extra=fields)
            raise
        return vm

    def _enter(self, vm: Vm, client: Credentials, user: User) -> Vm | None:
        """Take an id, and count the VM; returns the VM that has gone and had the id before, if there is one.

        Raises `RegistryError` or `LimitReached`; nothing is taken then.
        """
        with self._lock:
            before = self._by_id.get(vm.container_id)
        # Looked at first: nothing is counted for an id that is taken, even for a user who is at a limit.
        self._check_free(before, vm.container_id, client)
        charges = [user.charge("vms")]
        try:
            charges.append(user.charge("request_bytes", len(vm.container_id)))
            with self._lock:
                if self._by_id.get(vm.container_id) is not before:
                    raise _taken(vm.container_id)
                self._vms[vm] = charges
                self._by_id[vm.container_id] = vm
        except BaseException:
            with self._lock:
                self._vms.pop(vm, None)
            for charge in charges:
                charge.give_back()
            raise
        return before

    def _leave_to(self, before: Vm | None) -> None:
        """A hello that failed changes nothing: an id that it took over is again that of the VM before."""
        with self._lock:
            if before:
                self._by_id.setdefault(before.container_id, before)

    def _check_free(self, before: Vm | None, container_id: str, client: Credentials) -> None:
        """An id whose VM has gone may be taken over by those who could say bye for it, and by nobody else.

        A client that attaches by name trusts the name. Raises `RegistryError`.
        """
        if before and not (before.is_gone and self._may_use(client, before.owner)):
            raise _taken(container_id)

    def _claim(self, vm: Vm, client: Credentials, peer: Peer) -> str:
        """Note what a VM is connected to; returns why it cannot be had if another one is connected there.

        A hypervisor answers one connection at a time, so the second one would wait in vain. A VM that lingers
        after bye is no reason: its turn ends soon.
        """
        with self._lock:
            holders = (
                other
                for other in self._vms
                if other is not vm and peer in other.peers and other.state in (State.STARTING, State.UP)
            )
            holder = next(holders, None)
            if holder is None:
                vm.peers.add(peer)
                return ""
        if self._may_use(client, holder.owner):
            return f"the VM '{shorten(holder.container_id)}' has it already"
        return "it is in use already"

    def get(self, container_id: str, client: Credentials) -> Vm:
        """Return the VM that is registered under an id, and up or gone. Raises `RegistryError`."""
        with self._lock:
            vm = self._by_id.get(container_id)
        if vm is None or vm.state is State.STARTING or not self._may_use(client, vm.owner):
            raise RegistryError(f"unknown containerID: {container_id}")
        return vm

    def unregister(self, container_id: str, client: Credentials) -> None:
        """Free an id and let its VM go. Raises `RegistryError`."""
        vm = self.get(container_id, client)
        with self._lock:
            if self._by_id.get(container_id) is not vm:  # somebody else has just done so
                raise RegistryError(f"unknown containerID: {container_id}")
            del self._by_id[container_id]
        vm.leave()
        logger.info("VM unregistered", extra={"vm": container_id})

    def vms(self) -> list[Vm]:
        """Return all VMs that have not gone, those without an id included."""
        with self._lock:
            return list(self._vms)

    def vms_of(self, client: Credentials) -> list[Vm]:
        """Return the VMs that a client may use, those included that have gone and keep their ids."""
        with self._lock:
            vms = {*self._vms, *self._by_id.values()}
        return [vm for vm in vms if self._may_use(client, vm.owner)]

    def _may_use(self, client: Credentials, owner: int) -> bool:
        return client.uid == owner or may_use(self._live.current.access, client, owner)

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be had within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free

    def failed(self, client: Credentials) -> list[FailedVm]:
        """Return the VMs that a client might have used and that have failed, the latest first."""
        with self._lock:
            failed = list(reversed(self._failed))
        return [ended for ended in failed if self._may_use(client, ended.owner)]

    def spooled(self, client: Credentials) -> int:
        """Bytes that wait on disk for all clients together, or for the client's user if it is no admin."""
        everything = is_admin(self._live.current.access, client)
        return self._space.used if everything else self._space.used_by(client.uid)

    def user_status(self, client: Credentials) -> list[UserStatus]:
        """Return what each user has that a client may know of: its own, or all if it is an admin."""
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
        if state is State.UP and vm.state is State.UP:
            logger.info("VM registered", extra={"vm": vm.container_id, "uid": vm.owner})
        if state is not State.GONE:
            return
        with self._lock:
            charges = self._vms.pop(vm, [])
            keeps_id = vm.came_up and len(vm.container_id) <= _LONGEST_KEPT
            if not keeps_id and self._by_id.get(vm.container_id) is vm:
                del self._by_id[vm.container_id]
            if vm.failed and vm.trouble:
                self._failed.append(FailedVm(vm.container_id[:_LONGEST_KEPT], vm.owner, vm.trouble))
                _drop_one_over(self._failed, _MOST_FAILED)
            self._forget_gone()
        for charge in charges:
            charge.give_back()

    def _forget_gone(self) -> None:
        """Keep as many ids of VMs that have gone as there may be VMs. Requires _lock."""
        gone = deque(vm for vm in self._by_id.values() if vm.state is State.GONE)
        if (forgotten := _drop_one_over(gone, self._live.current.limits.vms)) is not None:
            del self._by_id[forgotten.container_id]


def _taken(container_id: str) -> RegistryError:
    return RegistryError(f"{container_id}: container already registered")


def _drop_one_over(vms: deque[T], most: int) -> T | None:
    """If there are more than `most`, drop the oldest of the user who has most; returns it."""
    if len(vms) <= most:
        return None
    [(owner, _)] = Counter(vm.owner for vm in vms).most_common(1)
    oldest = next(vm for vm in vms if vm.owner == owner)
    vms.remove(oldest)
    return oldest
