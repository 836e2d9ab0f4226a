"""Which VMs there are: ids, and the VMs that clients have registered under them."""

import threading
from collections import deque

from cc_proxy.api.payloads import Hello
from cc_proxy.log import logger
from cc_proxy.proxy.spool import SpoolSpace
from cc_proxy.proxy.vm import State, Trouble, Vm, VmError
from cc_proxy.settings import LiveSettings

#: VMs that failed and are gone, of which the last error is kept.
_MOST_ENDED = 32


class RegistryError(Exception):
    """An id that is taken, or unknown; the text is what clients are told."""


class Registry:
    """All VMs of the daemon. Any thread may call."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._space = SpoolSpace(live)
        self._lock = threading.Lock()  # guards all that follows; nothing else is locked while it is held
        self._by_id: dict[str, Vm] = {}  # from the beginning of hello until bye, or until the VM is lost
        self._vms: set[Vm] = set()  # those that have not ended
        self._failed: deque[tuple[str, Trouble]] = deque(maxlen=_MOST_ENDED)  # ids, the latest last

    def register(self, hello: Hello) -> Vm:
        """Register the VM behind two sockets; returns once it is up.

        The id is taken from the beginning, and free again if this fails. Raises `RegistryError` or `VmError`.
        """
        container_id = hello.container_id
        vm = Vm(container_id, self._live, self._space, self._note_change)
        with self._lock:
            if container_id in self._by_id:
                raise RegistryError(f"{container_id}: container already registered")
            most = self._live.current.limits.vms
            if len(self._vms) >= most:
                raise RegistryError(f"the limit of {most} VMs is reached")
            self._by_id[container_id] = vm
            self._vms.add(vm)
        try:
            vm.start(hello)
        except VmError as error:
            logger.warning("VM not registered", extra={"vm": container_id, "error": str(error)})
            raise
        return vm

    def get(self, container_id: str) -> Vm:
        """Return the VM that is registered and up under an id. Raises `RegistryError`."""
        with self._lock:
            vm = self._by_id.get(container_id)
        if vm is None or vm.state is not State.UP:
            raise RegistryError(f"unknown containerID: {container_id}")
        return vm

    def unregister(self, container_id: str) -> None:
        """Free an id and let its VM go. Raises `RegistryError`."""
        if not self.get(container_id).leave():
            raise RegistryError(f"unknown containerID: {container_id}")

    def vms(self) -> list[Vm]:
        """Return all VMs that have not ended, those without an id included."""
        with self._lock:
            return list(self._vms)

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be had within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free

    def failed(self) -> list[tuple[str, Trouble]]:
        """Return the ids of the VMs that failed of late and have ended, with the cause, the latest first."""
        with self._lock:
            return list(reversed(self._failed))

    @property
    def spooled(self) -> int:
        """Bytes that wait on disk for all clients together."""
        return self._space.used

    def _note_change(self, vm: Vm) -> None:
        state = vm.state
        if state is State.UP:
            logger.info("VM registered", extra={"vm": vm.container_id})
            return
        with self._lock:
            if self._by_id.get(vm.container_id) is vm:
                del self._by_id[vm.container_id]
            if state is State.ENDED:
                self._vms.discard(vm)
                if vm.failed and vm.trouble:
                    self._failed.append((vm.container_id, vm.trouble))
        if state is State.LEAVING:
            logger.info("VM unregistered", extra={"vm": vm.container_id})
