"""The daemon as a whole: what is started, in which order, and how it stops."""

import signal
import threading
import time

from cc_proxy.log import logger
from cc_proxy.proxy.listener import Listener
from cc_proxy.proxy.registry import Registry
from cc_proxy.proxy.server import Server
from cc_proxy.proxy.status import About
from cc_proxy.settings import Settings

#: Seconds that what is in flight gets to finish when the daemon stops.
STOP_TIMEOUT = 5.0
#: So much of it is left for what VMs have sent, however long requests take.
_DELIVERY_TIME = 1.0
#: Address space of each thread's stack. Little of it is ever touched, and there may be thousands.
_STACK_SIZE = 512 * 1024

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def block_signals() -> None:
    """Keep signals until `serve` waits for them; threads made from now on never see them. Main thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def serve(listener: Listener, settings: Settings, settings_file: str = "") -> None:
    """Serve clients on a listening socket until SIGTERM or SIGINT. Main thread, after `block_signals`.

    The signals are waited for, so nothing ever runs in a signal handler; one more changes nothing.
    """
    threading.stack_size(_STACK_SIZE)
    registry = Registry(settings)
    with Server(listener, registry, settings.limits, About(settings_file)) as server:
        server.start()
        logger.info("ready", extra={"socket": listener.socket.getsockname()})
        received = signal.sigwait(_STOP_SIGNALS)
        logger.info("stopping", extra={"signal": signal.Signals(received).name})
        _stop(server, registry)


def _stop(server: Server, registry: Registry) -> None:
    """Stop accepting; let requests in flight finish, then what VMs have sent; give up when time is over."""
    deadline = time.monotonic() + STOP_TIMEOUT
    server.stop_accepting()
    server.join_connections(STOP_TIMEOUT - _DELIVERY_TIME)
    vms = registry.vms()
    for vm in vms:
        vm.stop()
    left = [vm.container_id for vm in vms if not vm.join(max(0.0, deadline - time.monotonic()))]
    if left:
        logger.warning("stopped with output undelivered", extra={"vms": left})
    for vm in vms:
        vm.abort()
        vm.join(1.0)
