"""Puts together the answer to `status`: the state of the daemon and its VMs.

A pump's part (`streams/stats.py`) comes from its thread, through its mailbox, so it shows one moment and
takes no lock on the data path. All pumps are asked at once and share one deadline: one that is stuck delays
no other, and the answer says so. Everything else is read value by value.
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
    PATIENCE,
    EndedVm,
    LastError,
    Replaced,
    Status,
    Streams,
    VmStatus,
    WaitingCommand,
    shorten,
)
from cc_proxy.continuity import gaps
from cc_proxy.linux.credentials import Credentials
from cc_proxy.log.levels import current_level
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.states import Trouble
from cc_proxy.proxy.vms.vm import Vm


@dataclass(frozen=True)
class About:
    """What `status` says of the daemon as a whole."""

    #: Returns the path of the settings file; empty if there is none. Any thread.
    settings_file: Callable[[], str] = str
    #: When the first in the chain of processes that replaced each other began (`time.monotonic`).
    known_since: float = field(default_factory=time.monotonic)
    replaced: Replaced = field(default_factory=Replaced)
    started: float = field(default_factory=time.monotonic)


def describe(about: About, registry: Registry, asker: Credentials, attached: Iterable[Vm | None]) -> Status:
    """Return the state of everything that `asker` may see. Waits half a second at most. Any thread.

    `attached` has the VM, or None, of each connection that it may see.
    """
    vms = sorted(registry.vms_of(asker), key=lambda vm: (vm.container_id, vm.created))
    listed = vms[:MOST_VMS]
    clients = Counter(attached)
    gap_count, lost = gaps.counts()
    return Status(
        version=__version__,
        pid=os.getpid(),
        uptime=time.monotonic() - about.started,
        known_for=time.monotonic() - about.known_since,
        replaced=about.replaced,
        gaps=gap_count,
        lost=lost,
        settings_file=about.settings_file(),
        log_level=current_level(),
        connections=clients.total(),
        users=registry.user_status(asker),
        spooled=registry.spooled(asker),
        vms=_vms(listed, clients),
        vm_count=len(vms),
        ended=[
            EndedVm(id=shorten(ended.container_id), error=_error(ended.trouble))
            for ended in registry.failed(asker)
        ],
    )


def _vms(vms: list[Vm], clients: Counter[Vm | None]) -> list[VmStatus]:
    """Ask all pumps, and then wait for their answers."""
    asked = [(vm, vm.describe()) for vm in vms]
    deadline = time.monotonic() + PATIENCE
    return [_vm(vm, clients[vm], answer, deadline) for vm, answer in asked]


def _vm(vm: Vm, clients: int, asked: Future[Streams] | None, deadline: float) -> VmStatus:
    streams, answers = _answer(asked, deadline)
    now = time.monotonic()
    control = vm.control
    commands = control.waiting() if control else []
    return VmStatus(
        id=shorten(vm.container_id),
        uid=vm.owner,
        state=vm.life.state.name.lower(),
        age=now - vm.created,
        clients=clients,
        streams=streams,
        answers=answers,
        commands=[WaitingCommand(name=code.hyper_name, age=now - at) for code, at in commands[:MOST_LISTED]],
        waiting_commands=len(commands),
        unanswered=control.unanswered if control else 0,
        last_error=_error(vm.life.trouble) if vm.life.trouble else None,
    )


def _answer(asked: Future[Streams] | None, deadline: float) -> tuple[Streams | None, bool]:
    """Return a pump's answer, and whether it came in time. A VM without a pump needs none."""
    if asked is None:
        return None, True
    try:
        return asked.result(max(0.0, deadline - time.monotonic())), True
    except CancelledError:  # the pump has just ended
        return None, True
    except TimeoutError:
        return None, False


def _error(trouble: Trouble) -> LastError:
    return LastError(text=shorten(trouble.text), age=time.monotonic() - trouble.at)
