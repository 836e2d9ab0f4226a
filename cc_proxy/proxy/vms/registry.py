"""Which VMs there are: ids, and the VMs that clients have registered under them."""

import threading
from collections import Counter, deque
from typing import NamedTuple

from cc_proxy.access import is_admin, may_use
from cc_proxy.api.payloads import Hello
from cc_proxy.api.status import MOST_USERS, UserStatus
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.spool import SpoolSpace
from cc_proxy.proxy.users import LimitReached, Share, Shares
from cc_proxy.proxy.vms.dialer import Dialer
from cc_proxy.proxy.vms.vm import State, Trouble, Vm, VmError
from cc_proxy.settings import LiveSettings

#: VMs that failed and are gone, of which the last error is kept.
_MOST_ENDED = 32
#: Characters of the id of a VM that has ended.
_MOST_KEPT = 4_096


class RegistryError(Exception):
    """An id that is taken, or unknown; the text is what clients are told."""


class FailedVm(NamedTuple):
    """What is left of a VM that failed."""

    container_id: str
    owner: int
    trouble: Trouble


class Registry:
    """All VMs of the daemon. Any thread may call.

    Who asks for a VM that is not theirs to use is told what they were told if there were none.
    """

    def __init__(self, live: LiveSettings, own_address: str | bytes | None = None) -> None:
        """`own_address` is what the daemon's listening socket was bound to: no VM is there."""
        self._live = live
        self._own_address = own_address
        self._space = SpoolSpace(live)
        #: What each user has.
        self.shares = Shares(live)
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._by_id: dict[str, Vm] = {}  # from the beginning of hello until bye, or until the VM is lost
        self._vms: set[Vm] = set()  # those that have not ended
        self._failed: deque[FailedVm] = deque()  # the latest last

    def register(self, hello: Hello, client: Credentials) -> Vm:
        """Register the VM behind two sockets as the client's; returns once it is up.

        The id is taken from the beginning, and free again if this fails. Raises `RegistryError`,
        `LimitReached` or `VmError`.
        """
        container_id = hello.container_id
        share = self.shares.of(client.uid)
        vm = Vm(container_id, client.uid, self._live, self._space, self._note_change)
        self._check_free(container_id)  # also for those who have as many as they may: nothing is taken for it
        _take(share, container_id)
        try:
            self._enter(vm)
        except BaseException:
            _give_back(share, container_id)
            raise
        try:
            vm.start(hello, Dialer(client, share, self._own_address))
        except VmError as error:
            fields = {"vm": container_id, "uid": client.uid, "error": str(error)}
            logger.warning("VM not registered", extra=fields)
            raise
        return vm

    def _check_free(self, container_id: str) -> None:
        with self._lock:
            if container_id in self._by_id:
                raise RegistryError(f"{container_id}: container already registered")

    def _enter(self, vm: Vm) -> None:
        with self._lock:
            if vm.container_id in self._by_id:
                raise RegistryError(f"{vm.container_id}: container already registered")
            self._vms.add(vm)
            try:
                self._by_id[vm.container_id] = vm
            except BaseException:
                self._vms.discard(vm)
                raise

    def get(self, container_id: str, client: Credentials) -> Vm:
        """Return the VM that is registered and up under an id. Raises `RegistryError`."""
        with self._lock:
            vm = self._by_id.get(container_id)
        if vm is None or vm.state is not State.UP or not self._may_use(client, vm.owner):
            raise RegistryError(f"unknown containerID: {container_id}")
        return vm

    def unregister(self, container_id: str, client: Credentials) -> None:
        """Free an id and let its VM go. Raises `RegistryError`."""
        if not self.get(container_id, client).leave():
            raise RegistryError(f"unknown containerID: {container_id}")

    def vms(self) -> list[Vm]:
        """Return all VMs that have not ended, those without an id included."""
        with self._lock:
            return list(self._vms)

    def vms_of(self, client: Credentials) -> list[Vm]:
        """Return those of `vms` that a client may use."""
        return [vm for vm in self.vms() if self._may_use(client, vm.owner)]

    def _may_use(self, client: Credentials, owner: int) -> bool:
        return client.uid == owner or may_use(self._live.current.access, client, owner)

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be had within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free

    def failed(self, client: Credentials) -> list[FailedVm]:
        """Return the VMs that a client might have used, failed of late and have ended, the latest first."""
        with self._lock:
            failed = list(reversed(self._failed))
        return [ended for ended in failed if self._may_use(client, ended.owner)]

    def spooled(self, client: Credentials) -> int:
        """Bytes that wait on disk for all clients together, or for the client's user if it is no admin."""
        everything = is_admin(self._live.current.access, client)
        return self._space.used if everything else self._space.used_by(client.uid)

    def users(self, client: Credentials) -> list[UserStatus]:
        """Return what each user has that a client may know of: its own, or all if it is an admin."""
        everybody = is_admin(self._live.current.access, client)
        used = self.shares.used
        return [
            UserStatus(
                uid=uid,
                connections=used(uid, "connections"),
                vms=used(uid, "vms"),
                sessions=used(uid, "sessions"),
                commands=used(uid, "commands"),
                spooled=self._space.used_by(uid),
            )
            for uid in self.shares.users()
            if everybody or uid == client.uid
        ][:MOST_USERS]

    def _note_change(self, vm: Vm, state: State) -> None:
        """Several may be told at once, and in any order: each has something of its own to do."""
        if state is State.UP:
            if vm.state is State.UP:
                logger.info("VM registered", extra={"vm": vm.container_id, "uid": vm.owner})
            return
        with self._lock:
            if self._by_id.get(vm.container_id) is vm:
                del self._by_id[vm.container_id]
            ended = state is State.ENDED and vm in self._vms  # two moves may be told of when it has ended
            if ended:
                self._vms.discard(vm)
                if vm.failed and vm.trouble:
                    self._keep(FailedVm(vm.container_id[:_MOST_KEPT], vm.owner, vm.trouble))
        if ended:
            _give_back(self.shares.of(vm.owner), vm.container_id)
            vm.container_id = vm.container_id[:_MOST_KEPT]  # a client may stay attached, and keep it
        if state is State.LEAVING:
            logger.info("VM unregistered", extra={"vm": vm.container_id})

    def _keep(self, failed: FailedVm) -> None:
        """Note a VM that has failed, in place of the oldest of the user who has most. Requires _lock."""
        self._failed.append(failed)
        if len(self._failed) > _MOST_ENDED:
            [(most, _)] = Counter(other.owner for other in self._failed).most_common(1)
            self._failed.remove(next(other for other in self._failed if other.owner == most))


def _take(share: Share, container_id: str) -> None:
    """Count a VM, and what its id takes of memory for as long as there is the VM. Raises `LimitReached`."""
    share.take("vms")
    try:
        share.take("request_bytes", len(container_id))
    except LimitReached:
        share.give_back("vms")
        raise


def _give_back(share: Share, container_id: str) -> None:
    share.give_back("vms")
    share.give_back("request_bytes", len(container_id))
