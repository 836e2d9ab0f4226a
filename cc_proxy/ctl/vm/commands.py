"""`vm`: VMs that keep running after the command has ended."""

import os
from contextlib import ExitStack
from typing import Literal

from cc_proxy.api import Client, Refused
from cc_proxy.ctl.connection import connect
from cc_proxy.ctl.errors import Failure
from cc_proxy.ctl.options import ProcessOptions, VmOptions
from cc_proxy.ctl.pod import TemporaryPod
from cc_proxy.ctl.requests import NewContainer, hyper_process
from cc_proxy.ctl.signals import Signals
from cc_proxy.ctl.stdio import show
from cc_proxy.ctl.vm.directory import directory_of, end_owner, is_owned, remove_stale, was_started
from cc_proxy.ctl.vm.lifetime import virtual_machine
from cc_proxy.ctl.vm.settings import choose

Action = Literal["start", "stop"]

#: The first process of the pod, which ends when this does. It only waits for a signal.
_FIRST = ProcessOptions(("tail", "-f", "/dev/null"))


def vm(asked: VmOptions) -> int:
    """Start or stop such a VM; returns the exit status."""
    return _start(asked) if asked.action == "start" else _stop(asked)


def _start(asked: VmOptions) -> int:
    settings = choose(asked.guest)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        client = stack.enter_context(connect(asked.proxy, signals))
        machine = stack.enter_context(virtual_machine(signals, settings, asked.container_id))
        pod = stack.enter_context(TemporaryPod(asked.proxy, asked.container_id, signals))
        pod.register(client, machine.sockets)
        pod.start(client)
        with signals.may_interrupt():
            _start_container(client, asked.container_id)
        machine.keep()
        pod.keep()
    show(f"{asked.container_id}: the VM is up\n")
    return 0


def _start_container(client: Client, container_id: str) -> None:
    io_base, fd = client.allocate_io(2)
    os.close(fd)
    process = hyper_process(_FIRST, io_base, None)
    client.hyper("newcontainer", NewContainer(id=container_id, image=container_id, process=process))


def _stop(asked: VmOptions) -> int:
    directory = directory_of(asked.container_id)
    with Signals() as signals:
        try:
            with connect(asked.proxy, signals) as client, signals.may_interrupt():
                client.attach(asked.container_id)
        except (Failure, Refused):
            if not is_owned(directory):
                raise
        else:
            if not was_started(directory):
                hint = f"`cc-proxyctl bye {asked.container_id}` unregisters it"
                raise Failure(f"{asked.container_id}: no VM that you have started with `vm start`", hint=hint)
            with TemporaryPod(asked.proxy, asked.container_id, signals) as pod:
                pod.adopt()
        with signals.may_interrupt():
            end_owner(directory)
    remove_stale()
    return 0
