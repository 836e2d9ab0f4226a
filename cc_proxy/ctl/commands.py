"""The table of commands. To add a command, add a row."""

from argparse import ArgumentParser
from typing import Any, get_args

from cc_proxy.ctl import options, single
from cc_proxy.ctl.embedded import agent
from cc_proxy.ctl.parser import (
    Subcommand,
    add_console,
    add_id,
    add_process,
    add_sockets,
    add_timeout,
    fd_number,
    new_id,
    text,
)
from cc_proxy.ctl.run import execute, run
from cc_proxy.ctl.status import log_level, status
from cc_proxy.ctl.vm.arguments import add_vm_settings
from cc_proxy.ctl.vm.commands import Action, vm
from cc_proxy.hyperstart.codes import COMMANDS as HYPER_COMMANDS
from cc_proxy.log.levels import LogLevel

_PROCESS_OPTIONS = "[-t] [-i] [-e K=V]... [-w DIR] [-u USER[:GROUP]] [--timeout S]"
_PROCESS_NOTES = """
With -t the process gets this terminal, which must be stdin. Without -t, stdout and stderr stay
separate. Without -i the process's stdin is empty. With -i, hyperstart drops input that comes while
the process's pipe (64 KiB) or terminal (4 KiB) is full. The exit status is the process's own."""
_PATIENCE = """\
The VM may still be starting: the proxy waits for its sockets and its agent for as long as its
setting vm.ready_timeout says, 30 seconds by default."""


def _add_local(parser: ArgumentParser) -> None:
    parser.add_argument("--local", action="store_true", help="start an embedded agent, and use it as the VM")
    parser.add_argument("--vm", action="store_true", help="start a VM under QEMU, and end it afterwards")
    add_sockets(parser, required=False)


def _add_new_id(parser: ArgumentParser) -> None:
    parser.add_argument("--id", metavar="ID", type=new_id, help="the container id (default: a random one)")


def _add_vm_action(parser: ArgumentParser) -> None:
    parser.add_argument("action", metavar="start|stop", choices=get_args(Action), help="what to do")


def _add_vm_id(parser: ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", type=new_id, help="the container id of the VM")


def _add_hyper_command(parser: ArgumentParser) -> None:
    known = ", ".join(HYPER_COMMANDS)
    parser.add_argument("name", metavar="NAME", type=text, help=f"the agent's command: {known}")
    parser.add_argument(
        "data", metavar="JSON", type=text, nargs="?",
        help="the command's data, sent byte for byte; - reads it from stdin",
    )  # fmt: skip


def _add_json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")


def _add_level(parser: ArgumentParser) -> None:
    levels = get_args(LogLevel)
    parser.add_argument("level", metavar="LEVEL", choices=levels, help=f"one of {', '.join(levels)}")


def _add_ready_fd(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ready-fd", metavar="N", type=fd_number,
        help="write a byte to this fd once both sockets listen; if it is a socket, end when its peer does",
    )  # fmt: skip


def _add_remove(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--remove", metavar="DIR", type=text, default="",
        help="at the end, remove this directory and everything in it if the peer of --ready-fd has gone",
    )  # fmt: skip


def _add_lossless(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--lossless", action="store_true",
        help="keep stdin that a process does not take yet, where hyperstart throws it away",
    )  # fmt: skip


COMMANDS: tuple[Subcommand[Any], ...] = (
    Subcommand(
        name="run",
        summary="run a process in a pod of its own, and clean up after it",
        description="""\
Register a VM, start a pod of one process in it, and carry that process's stdio until it ends.
Then destroy the pod and unregister the VM. Signals are passed on to the process, unless it has
the terminal. The agent reports status 0 for a process that a signal killed. So if the process
ends with 0 within 5 seconds of signal N, the exit status is 128+N. The third SIGINT or SIGTERM
within 5 seconds ends cc-proxyctl and the pod, whatever the process does.

--ctl and --io name the sockets of a VM that somebody else starts.
"""
        + _PATIENCE
        + "\n"
        + _PROCESS_NOTES,
        examples=(
            "run --local -- echo hello",
            "run --local -ti -- sh",
            "run --ctl /run/vm1/ctl.sock --io /run/vm1/io.sock --id web -e PORT=80 -- httpd -f",
            "run --local -i -- wc -c < /etc/services",
            "run --vm --memory 512 -- uname -a",
        ),
        arguments=(_add_local, add_console, _add_new_id, add_timeout, add_vm_settings, add_process),
        read=options.RunOptions.of,
        do=run,
        usage="cc-proxyctl run (--local | --vm [VM OPTION]... | --ctl PATH --io PATH)\n"
        "                       [--console PATH] [--id ID]\n"
        f"                       {_PROCESS_OPTIONS}\n"
        "                       -- CMD [ARG]...",
    ),
    Subcommand(
        name="exec",
        summary="run another process in a running pod",
        description="""\
Start another process in the container of a registered VM, and carry its stdio until it ends.
A signal ends cc-proxyctl, and the process then reads end of file from its stdin. With -t it
reads a Ctrl-D instead, which ends a shell that waits for a command. The process keeps running in
the VM if it does not read its stdin, takes Ctrl-D for an ordinary key, or has a half-typed line
before it. After SIGKILL cc-proxyctl cannot send anything, so a process with a terminal keeps
running too. `exec ID -- kill PID` ends such a process."""
        + _PROCESS_NOTES,
        examples=("exec web -- ps aux", "exec -ti web -- sh", "exec -i web -- tee /etc/motd < motd"),
        arguments=(add_timeout, add_id, add_process),
        read=options.ExecOptions.of,
        do=execute,
        usage=f"cc-proxyctl exec {_PROCESS_OPTIONS}\n                        ID -- CMD [ARG]...",
    ),
    Subcommand(
        name="vm",
        summary="start a VM that stays, or stop it",
        description="""\
`start` starts a VM under QEMU, registers it, and starts a pod in it, whose first process does
nothing: `exec` runs others. The VM runs until it is stopped, even if the proxy ends before. `stop`
destroys the pod, unregisters the VM and ends QEMU; it is for the user who started the VM.""",
        examples=("vm start web", "vm start web --memory 1024 --cpus 2", "vm stop web"),
        arguments=(_add_vm_action, _add_vm_id, add_timeout, add_vm_settings),
        read=options.VmOptions.of,
        do=vm,
        usage="cc-proxyctl vm start [VM OPTION]... [--timeout S] ID\n"
        "       cc-proxyctl vm stop [--timeout S] ID",
    ),
    Subcommand(
        name="hello",
        summary="register a VM",
        description="Have the proxy connect to a VM, wait until it is ready, and register it.\n" + _PATIENCE,
        examples=("hello web --ctl /run/vm1/ctl.sock --io /run/vm1/io.sock",),
        arguments=(add_id, add_sockets, add_console, add_timeout),
        read=options.HelloOptions.of,
        do=single.hello,
    ),
    Subcommand(
        name="attach",
        aliases=("ping",),
        summary="check that a VM is registered and answers",
        description="Attach to a registered VM, and ping its agent.",
        examples=("attach web", "ping web --timeout 1"),
        arguments=(add_id, add_timeout),
        read=options.RegisteredOptions.of,
        do=single.attach,
    ),
    Subcommand(
        name="hyper",
        summary="send a command to a VM's agent",
        description="Send a command to the agent of a registered VM and wait for its acknowledgement.",
        examples=(
            "hyper web ping",
            """hyper web killcontainer '{"container":"web","signal":15}'""",
            "hyper web newcontainer - < container.json",
        ),
        arguments=(add_id, _add_hyper_command, add_timeout),
        read=options.HyperOptions.of,
        do=single.hyper,
    ),
    Subcommand(
        name="bye",
        summary="unregister a VM",
        description="Have the proxy forget a VM. Its id can be used again at once.",
        examples=("bye web",),
        arguments=(add_id, add_timeout),
        read=options.RegisteredOptions.of,
        do=single.bye,
    ),
    Subcommand(
        name="status",
        summary="show the state of the proxy and its VMs",
        description="""\
Show the daemon, its VMs, what waits in each of them and for whom, and what went wrong last.
This changes nothing.""",
        examples=("status", "status --json | jq '.vms[] | select(.streams.paused) | .id'"),
        arguments=(_add_json, add_timeout),
        read=options.StatusOptions.of,
        do=status,
    ),
    Subcommand(
        name="log-level",
        summary="change what the proxy logs",
        description="Make the proxy log events of LEVEL and above, until it reads its settings or stops.",
        examples=("log-level debug", "log-level info"),
        arguments=(_add_level, add_timeout),
        read=options.LogLevelOptions.of,
        do=log_level,
    ),
    Subcommand(
        name="agent",
        summary="stand in for a VM: run processes on this machine",
        description="""\
Listen on two sockets, as a VM with its agent does, and run processes on this machine. It ends, and
removes its sockets, when its pod is destroyed; after `bye` alone it keeps running.""",
        examples=("agent --ctl /tmp/ctl.sock --io /tmp/io.sock",),
        arguments=(add_sockets, _add_ready_fd, _add_remove, _add_lossless),
        read=options.AgentOptions.of,
        do=agent,
    ),
)
