"""Connecting to the proxy, and asking it why a VM has gone."""

import errno
import time
from contextlib import AbstractContextManager, nullcontext

from cc_proxy.api import Client, ProxyError, Refused
from cc_proxy.api.status import VmStatus, shorten
from cc_proxy.ctl.errors import Failure, reason
from cc_proxy.ctl.options import SOCKET_VARIABLE, ProxyOptions
from cc_proxy.ctl.signals import Signals
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH

#: Seconds that it may take to ask the proxy why something went wrong.
_PATIENCE = 2.0

_SEE_LOG = "cc-proxy's log says why"
_NOBODY_LISTENS = f"start cc-proxy, or name its socket with --socket-path or {SOCKET_VARIABLE}"
#: Python itself refuses a path that is too long, and no other error of a connect lacks a number.
_TOO_LONG = None
_NEXT_STEPS = {
    _TOO_LONG: f"a socket's path has at most {MAX_SOCKET_PATH} bytes",
    errno.ENOENT: _NOBODY_LISTENS,
    errno.ECONNREFUSED: _NOBODY_LISTENS,
    errno.EACCES: "the socket is for its owner and group: become root, or a member of the group",
}


def connect(proxy: ProxyOptions, signals: Signals | None = None) -> Client:
    """Return a connected client. Raises `Failure` if no proxy can be reached.

    With `signals`, a signal that ends the command raises `Interrupted`.
    """
    interruptible: AbstractContextManager[None] = signals.may_interrupt() if signals else nullcontext()
    try:
        with interruptible:
            return Client(proxy.socket_path, timeout=proxy.timeout)
    except OSError as error:
        hint = _NEXT_STEPS.get(error.errno, "")
        text = f"cannot reach cc-proxy at {proxy.socket_path}: {reason(error)}"
        raise Failure(text, hint=hint) from None


def lost_streams(proxy: ProxyOptions, container_id: str, name: str, began: float) -> Failure:
    """Return the failure to report for the process `name`, whose streams ended before it did.

    Asks the proxy whether the VM or the proxy itself went away, and why. `began` is when the process was
    started (`time.monotonic`).
    """
    before_the_end = f"before '{name}' had ended"
    try:
        with Client(proxy.socket_path, timeout=_PATIENCE) as client:
            status, is_known = client.status(), _knows(client, container_id)
    except ProxyError as error:
        text = f"the VM or cc-proxy went away {before_the_end}; cc-proxy does not say which: {reason(error)}"
        return Failure(text, hint="its log may say it")
    except OSError:
        return Failure(f"cc-proxy went away {before_the_end}", hint="its log says why")
    age = time.monotonic() - began
    if max(status.uptime, status.known_for) < age:
        return Failure(f"cc-proxy was restarted {before_the_end}", hint="its log says why")
    vm_id = shorten(container_id)
    for ended in status.ended:
        if ended.id == vm_id and ended.error.age <= age:
            return Failure(f"the VM was lost {before_the_end}: {ended.error.text}")
    vm = next((vm for vm in status.vms if vm.id == vm_id and vm.age >= age), None)
    if vm is None or not is_known:  # another VM may have the id by now
        return Failure(f"somebody said bye for the VM {before_the_end}")
    return _gone(vm, before_the_end)


def _knows(client: Client, container_id: str) -> bool:
    """Whether a VM is registered under the id. One that is lost or powered off still is, until a bye."""
    try:
        client.attach(container_id)
    except Refused:
        return False
    return True


def _gone(vm: VmStatus, before_the_end: str) -> Failure:
    """Return the failure to report when a VM's streams have ended, as its status tells it."""
    if vm.state not in ("lost", "gone"):
        return Failure(f"cc-proxy closed the streams {before_the_end}", hint=_SEE_LOG)
    if vm.last_error:
        return Failure(f"the VM has gone {before_the_end}; its last error: {vm.last_error.text}")
    return Failure(f"the VM powered off {before_the_end}")
