"""The table of commands. Another command is another row."""

from argparse import ArgumentParser
from typing import Any, get_args

from cc_proxy.ctl import options, single
from cc_proxy.ctl.embedded import agent
from cc_proxy.ctl.parser import (
    Command,
    add_console,
    add_id,
    add_process,
    add_sockets,
    add_timeout,
    fd_number,
    text,
)
from cc_proxy.ctl.run import execute, run
from cc_proxy.ctl.status import log_level, status
from cc_proxy.hyperstart.codes import COMMANDS as HYPER_COMMANDS
from cc_proxy.settings import LogLevel

_PROCESS_OPTIONS = "[-t] [-i] [-e K=V]... [-w DIR] [-u USER[:GROUP]] [--timeout S]"
_PROCESS_NOTES = """
With -t the process gets this terminal, which has to be stdin; without, stdout and stderr stay
apart. Without -i the process finds its input at its end. The exit status is the process's own."""


def _run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--local", action="store_true", help="start an embedded agent and use it as the VM")
    add_sockets(parser, required=False)
    add_console(parser)
    parser.add_argument("--id", metavar="ID", type=text, help="the container id (default: a random one)")
    add_timeout(parser)
    add_process(parser)


def _exec_arguments(parser: ArgumentParser) -> None:
    add_timeout(parser)
    add_id(parser)
    add_process(parser)


def _hello_arguments(parser: ArgumentParser) -> None:
    add_id(parser)
    add_sockets(parser)
    add_console(parser)
    add_timeout(parser)


def _registered_arguments(parser: ArgumentParser) -> None:
    add_id(parser)
    add_timeout(parser)


def _hyper_arguments(parser: ArgumentParser) -> None:
    add_id(parser)
    known = ", ".join(HYPER_COMMANDS)
    parser.add_argument("name", metavar="NAME", type=text, help=f"the agent's command: {known}")
    parser.add_argument(
        "data",
        metavar="JSON",
        type=text,
        nargs="?",
        help="its data, sent byte for byte; - reads it from stdin",
    )
    add_timeout(parser)


def _status_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything, for programs to read")
    add_timeout(parser)


def _log_level_arguments(parser: ArgumentParser) -> None:
    levels = get_args(LogLevel)
    parser.add_argument("level", metavar="LEVEL", choices=levels, help=f"one of {', '.join(levels)}")
    add_timeout(parser)


def _agent_arguments(parser: ArgumentParser) -> None:
    add_sockets(parser)
    parser.add_argument(
        "--ready-fd",
        metavar="N",
        type=fd_number,
        help="write a byte to this fd when both sockets listen; if it is a socket, end when its peer does",
    )


COMMANDS: tuple[Command[Any], ...] = (
    Command(
        name="run",
        summary="run a process in a pod of its own, from hello to bye",
        description="""\
Register a VM, start a pod with one process, attend to it until it ends, and take both back.
Signals are passed on to the process, unless it has the terminal."""
        + _PROCESS_NOTES,
        examples=(
            "run --local -- echo hello",
            "run --local -ti -- sh",
            "run --ctl /run/vm1/ctl.sock --io /run/vm1/io.sock --id web -e PORT=80 -- httpd -f",
            "run --local -i -- wc -c < /etc/services",
        ),
        arguments=_run_arguments,
        read=options.Run.of,
        do=run,
        usage="cc-proxyctl run (--local | --ctl PATH --io PATH) [--console PATH] [--id ID]\n"
        f"                       {_PROCESS_OPTIONS}\n"
        "                       -- CMD [ARG]...",
    ),
    Command(
        name="exec",
        summary="run another process in a pod that runs",
        description="""\
Start a process in the container of a registered VM, and attend to it until it ends. Signals
end cc-proxyctl, and the process finds its input at its end."""
        + _PROCESS_NOTES,
        examples=("exec web -- ps aux", "exec -ti web -- sh", "exec -i web -- tee /etc/motd < motd"),
        arguments=_exec_arguments,
        read=options.Exec.of,
        do=execute,
        usage=f"cc-proxyctl exec {_PROCESS_OPTIONS}\n                        ID -- CMD [ARG]...",
    ),
    Command(
        name="hello",
        summary="register a VM",
        description="Have the proxy connect to a VM, wait until that is ready, and register it.",
        examples=("hello web --ctl /run/vm1/ctl.sock --io /run/vm1/io.sock",),
        arguments=_hello_arguments,
        read=options.Hello.of,
        do=single.hello,
    ),
    Command(
        name="attach",
        aliases=("ping",),
        summary="see whether a VM is registered and answers",
        description="Attach to a registered VM and have its agent answer a ping.",
        examples=("attach web", "ping web --timeout 1"),
        arguments=_registered_arguments,
        read=options.Registered.of,
        do=single.attach,
    ),
    Command(
        name="hyper",
        summary="have a VM's agent carry out a command",
        description="Send a command to the agent of a registered VM and wait for its acknowledgement.",
        examples=(
            "hyper web ping",
            """hyper web killcontainer '{"container":"web","signal":15}'""",
            "hyper web newcontainer - < container.json",
        ),
        arguments=_hyper_arguments,
        read=options.Hyper.of,
        do=single.hyper,
    ),
    Command(
        name="bye",
        summary="unregister a VM",
        description="Have the proxy forget a VM. Its id can be used again at once.",
        examples=("bye web",),
        arguments=_registered_arguments,
        read=options.Registered.of,
        do=single.bye,
    ),
    Command(
        name="status",
        summary="see how the proxy and its VMs are, and what waits",
        description="""\
Show the daemon, its VMs, what waits in each of them and for whom, and what went wrong last.
Nothing is disturbed by it.""",
        examples=("status", "status --json | jq '.vms[] | select(.streams.paused) | .id'"),
        arguments=_status_arguments,
        read=options.Status.of,
        do=status,
    ),
    Command(
        name="log-level",
        summary="have the proxy log more, or less",
        description="Have the daemon log what is at LEVEL or above, until its next reload or restart.",
        examples=("log-level debug", "log-level info"),
        arguments=_log_level_arguments,
        read=options.LogLevel.of,
        do=log_level,
    ),
    Command(
        name="agent",
        summary="be a VM's agent: run processes on this machine",
        description="Listen on two sockets as the agent in a VM does, and run processes right here.",
        examples=("agent --ctl /tmp/ctl.sock --io /tmp/io.sock",),
        arguments=_agent_arguments,
        read=options.Agent.of,
        do=agent,
    ),
)
