"""Whether the daemon does its work: what the watchdog of the service manager is told."""

import time

from cc_proxy.log.levels import logger
from cc_proxy.log.stacks import log_stacks
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.vms.registry import Registry

#: Seconds in which a lock must be free: nobody holds one for longer than a few steps.
_LOCK_TIMEOUT = 0.5
#: Seconds that the accept thread may sleep, however little the service manager allows.
_SLEEP = 1.0


class Watchdog:
    """Looks whether each part of the daemon still takes its turns. Main thread.

    Nothing that waits is ill: the accept thread wakes up several times a second, and the others answer at
    once unless they are in the middle of something.
    """

    def __init__(self, server: Server, registry: Registry) -> None:
        self._server = server
        self._registry = registry
        self._stuck: list[str] = []

    def is_good(self, patience: float) -> bool:
        """Whether all have taken a turn in the last `patience` seconds, which is how often this is called.

        If not, logs what is stuck and where every thread is, once.
        """
        stuck = self._find_stuck(patience)
        if stuck and stuck != self._stuck:
            logger.error("stuck: the watchdog is not served", extra={"stuck": stuck})
            if not self._stuck:
                log_stacks()
        elif self._stuck and not stuck:
            logger.warning("not stuck any more: the watchdog is served", extra={"was_stuck": self._stuck})
        self._stuck = stuck
        return not stuck

    def _find_stuck(self, patience: float) -> list[str]:
        stuck = []
        if time.monotonic() - self._server.turned_at > max(patience, _SLEEP):
            stuck.append("the accept thread")
        if not self._server.parking.probe():
            stuck.append("the parking thread")
        if not self._server.is_free(_LOCK_TIMEOUT):
            stuck.append("the lock of the connections")
        if not self._registry.is_free(_LOCK_TIMEOUT):
            return [*stuck, "the lock of the VMs"]
        return stuck + [f"the pump of VM {vm.container_id}" for vm in self._registry.vms() if not vm.probe()]
