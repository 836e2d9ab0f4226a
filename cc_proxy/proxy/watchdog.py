"""Checks that all parts of the daemon work, before the service manager's watchdog is fed."""

import time

from cc_proxy.log.levels import logger
from cc_proxy.log.stacks import log_stacks
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.vms.registry import Registry

#: Seconds within which a lock must become free. No thread holds one for longer than a few steps.
_LOCK_TIMEOUT = 0.5
#: Seconds that the accept thread may sleep, even if the service manager allows less.
_SLEEP = 1.0


class Watchdog:
    """Checks that each thread of the daemon still goes round its loop. Main thread.

    A thread that waits is well: the accept thread wakes up several times a second, and the others answer
    probes at once unless they are at work.
    """

    def __init__(self, server: Server, registry: Registry) -> None:
        self._server = server
        self._registry = registry
        self._stuck: list[str] = []

    def check(self, patience: float) -> bool:
        """Return whether all have gone round in the last `patience` seconds, and send new probes.

        Call it once in that time. If something is stuck, it logs what, and all threads' stacks, once.
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
        if not self._server.roster.is_free(_LOCK_TIMEOUT):
            stuck.append("the lock of the connections")
        if not self._registry.is_free(_LOCK_TIMEOUT):
            return [*stuck, "the lock of the VMs"]
        return stuck + [f"the pump of VM {vm.container_id}" for vm in self._registry.vms() if not vm.probe()]
