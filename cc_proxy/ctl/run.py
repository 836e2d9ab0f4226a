"""`run` and `exec`: a process attached to this command's standard streams."""

from contextlib import ExitStack

import msgspec

from cc_proxy.ctl import options
from cc_proxy.ctl.attendance import Attendance, terminal_for
from cc_proxy.ctl.connection import connect
from cc_proxy.ctl.local import local_agent
from cc_proxy.ctl.pod import TemporaryPod
from cc_proxy.ctl.requests import ExecCmd, HyperProcess, NewContainer
from cc_proxy.ctl.signals import Signals
from cc_proxy.ctl.vm.lifetime import virtual_machine
from cc_proxy.ctl.vm.settings import choose


def run(asked: options.RunOptions) -> int:
    """Start a pod with one process; returns the process's exit status. Nothing of the pod remains."""
    container_id = asked.container_id

    def new_container(process: HyperProcess) -> tuple[str, msgspec.Struct]:
        pod.busy = True
        return "newcontainer", NewContainer(id=container_id, image=container_id, process=process)

    terminal = terminal_for(asked.process)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        client = stack.enter_context(connect(asked.proxy, signals))
        vm = _vm(asked, signals, stack)
        pod = stack.enter_context(TemporaryPod(asked.proxy, container_id, signals))
        pod.register(client, vm)
        pod.start(client)
        attendance = Attendance(client, signals, asked.proxy, container_id, asked.process, terminal)
        status = attendance.run(new_container, passes_signals=terminal is None)
        pod.busy = False
        return status


def _vm(asked: options.RunOptions, signals: Signals, stack: ExitStack) -> options.VmSockets:
    """Return the sockets of the VM to use. If it has to be started first, it ends with the stack."""
    match asked.vm:
        case options.VmSockets():
            return asked.vm
        case options.GuestOptions():
            settings = choose(asked.vm)
            return stack.enter_context(virtual_machine(signals, settings, asked.container_id)).sockets
        case None:
            return stack.enter_context(local_agent(signals, asked.container_id, asked.console))


def execute(asked: options.ExecOptions) -> int:
    """Start a process in a running pod; returns its exit status.

    Signals end this command, and the process then reads end of file. They are not passed on, because the
    agent would deliver them to the container's first process.
    """

    def exec_cmd(process: HyperProcess) -> tuple[str, msgspec.Struct]:
        return "execcmd", ExecCmd(container=asked.container_id, process=process)

    terminal = terminal_for(asked.process)
    with Signals() as signals, connect(asked.proxy, signals) as client:
        with signals.may_interrupt():
            client.attach(asked.container_id)
        attendance = Attendance(client, signals, asked.proxy, asked.container_id, asked.process, terminal)
        return attendance.run(exec_cmd, passes_signals=False)
