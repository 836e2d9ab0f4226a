"""Stopping the daemon, which ends its VMs and connections too. Main thread."""

import socket
import time

from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.server import Server
from cc_proxy.proxy.vms.registry import Registry

#: Seconds for requests and output in flight to finish when the daemon stops.
STOP_TIMEOUT = 5.0
#: Seconds of these that requests cannot use up: they are for output of VMs, and for telling clients that wait
#: for a VM that it is gone.
_DELIVERY_TIME = 1.0


def stop(server: Server, registry: Registry) -> None:
    """Stop accepting; let requests in flight finish, then what VMs have sent; give up when time is over."""
    deadline = time.monotonic() + STOP_TIMEOUT
    server.stop_accepting()
    server.roster.wait_until_empty(max(0.0, deadline - _DELIVERY_TIME - time.monotonic()))
    # Users may have made all of that take longer.
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
    # A pump that hangs now hangs in the kernel, and ends with the process. All of them share this time.
    deadline = time.monotonic() + _DELIVERY_TIME
    for vm in vms:
        vm.join(max(0.0, deadline - time.monotonic()))
