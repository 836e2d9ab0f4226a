"""What `status` answers with: how the daemon and its VMs are, put together from all who know a part of it.

A pump's part (`streams.py`) is read while its thread waits, or comes from that through its mailbox: so it is
of one moment, and nothing on the data path is locked. They are asked one by one: hundreds that all have
something to say would leave nobody else the interpreter until they have said it, and it takes as long. One
that is stuck holds up no other, and has no part in the answer, which says so. The rest are plain reads of
single values, each right when it was read.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from cc_proxy import __version__
from cc_proxy.api.status import (
    MOST_LISTED,
    MOST_VMS,
    EndedVm,
    LastError,
    Status,
    Streams,
    VmStatus,
    WaitingCommand,
    shorten,
)
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import current_level
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.vm import Trouble, Vm

#: What there is of a pump that is asked: its answer, none yet, or none at all while there is no pump.
_Asked = Streams | Future[Streams] | None

#: So many pumps are asked, then others come to their turns for so many seconds.
_IN_A_ROW = 4
_BREATH = 0.000_1
#: Seconds that a pump gets to answer before the next one is asked, and that all together get for that.
_MOMENT = 0.02
_ASKING = 0.25
#: Seconds that those which have not answered yet get together, once all have been asked.
_PATIENCE = 0.5


@dataclass(frozen=True)
class About:
    """What the process knows of itself."""

    #: Returns the file that the settings are from; empty if there is none. Any thread.
    settings_file: Callable[[], str] = str
    started: float = field(default_factory=time.monotonic)


def describe(about: About, registry: Registry, asker: Credentials, attached: Iterable[Vm | None]) -> Status:
    """Return how everything is that `asker` may know of; any thread, for `_ASKING + _PATIENCE` at most.

    `attached` has the VM of each connection that it may know of.
    """
    vms = sorted(registry.vms_of(asker), key=lambda vm: (vm.container_id, vm.created))
    listed = vms[:MOST_VMS]
    clients = Counter(attached)
    return Status(
        version=__version__,
        pid=os.getpid(),
        uptime=time.monotonic() - about.started,
        settings_file=about.settings_file(),
        log_level=current_level(),
        connections=clients.total(),
        users=registry.users(asker),
        spooled=registry.spooled(asker),
        vms=_vms(listed, clients),
        vm_count=len(vms),
        ended=[
            EndedVm(id=shorten(ended.container_id), error=_error(ended.trouble))
            for ended in registry.failed(asker)
        ],
    )


def _vms(vms: list[Vm], clients: Counter[Vm | None]) -> list[VmStatus]:
    """Ask all pumps, each when the one before has answered or has not for a while."""
    until = time.monotonic() + _ASKING
    found, late = {}, {}
    for number, vm in enumerate(vms):
        if number and number % _IN_A_ROW == 0:
            time.sleep(_BREATH)
        asked = vm.describe()
        found[vm] = _vm(vm, clients[vm], asked, min(until, time.monotonic() + _MOMENT))
        if not found[vm].answers:
            late[vm] = asked
    deadline = time.monotonic() + _PATIENCE
    for vm, asked in late.items():
        found[vm] = _vm(vm, clients[vm], asked, deadline)
    return [*found.values()]


def _vm(vm: Vm, clients: int, asked: _Asked, deadline: float) -> VmStatus:
    streams, answers = _answer(asked, deadline)
    now = time.monotonic()
    control = vm.control
    commands = control.waiting() if control else []
    return VmStatus(
        id=shorten(vm.container_id),
        uid=vm.owner,
        state=vm.state.name.lower(),
        age=now - vm.created,
        clients=clients,
        streams=streams,
        answers=answers,
        commands=[WaitingCommand(name=code.hyper_name, age=now - at) for code, at in commands[:MOST_LISTED]],
        waiting_commands=len(commands),
        unanswered=control.unanswered if control else 0,
        last_error=_error(vm.trouble) if vm.trouble else None,
    )


def _answer(asked: _Asked, deadline: float) -> tuple[Streams | None, bool]:
    """Return what a pump says, and whether it has not failed to."""
    if not isinstance(asked, Future):
        return asked, True
    try:
        return asked.result(max(0.0, deadline - time.monotonic())), True
    except CancelledError:  # it has just ended
        return None, True
    except TimeoutError:
        return None, False


def _error(trouble: Trouble) -> LastError:
    return LastError(text=shorten(trouble.text), age=time.monotonic() - trouble.at)
