"""The end of the daemon, with which its VMs and clients end too. Main thread."""

import socket
import time

from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.vms.registry import Registry

#: Seconds that what is in flight gets to finish when the daemon stops.
STOP_TIMEOUT = 5.0
#: So much of it is left for what VMs have sent, and to tell who waits for a VM that it is gone, however long
#: requests take.
_DELIVERY_TIME = 1.0


def stop(server: Server, registry: Registry) -> None:
    """Stop accepting; let requests in flight finish, then what VMs have sent; give up when time is over."""
    deadline = time.monotonic() + STOP_TIMEOUT
    server.stop_accepting()
    server.roster.wait_until_empty(max(0.0, deadline - _DELIVERY_TIME - time.monotonic()))
    # Users may have seen to it that all of that took longer.
    deadline = max(deadline, time.monotonic() + _DELIVERY_TIME)
    vms = registry.vms()
    for vm in vms:
        vm.stop()
    server.roster.wait_until_empty(max(0.0, deadline - time.monotonic()))
    server.roster.shut_down(socket.SHUT_RDWR)
    left = [vm.container_id for vm in vms if not vm.join(max(0.0, deadline - time.monotonic()))]
    if left:
        logger.warning("stopped with output undelivered", extra={"vms": left})
    for vm in vms:
        vm.abort()
    # What hangs now hangs in the kernel, and ends with the process: all of them together get this long.
    deadline = time.monotonic() + _DELIVERY_TIME
    for vm in vms:
        vm.join(max(0.0, deadline - time.monotonic()))
