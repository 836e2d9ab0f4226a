"""The command line: what a command is, and the argparse parser for a table of commands. No I/O."""

import argparse
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import cc_proxy
from cc_proxy.api import DEFAULT_SOCKET
from cc_proxy.api.status import LONGEST_TEXT
from cc_proxy.ctl.options import GUEST_VARIABLE, SOCKET_VARIABLE

#: In seconds. Longer than the daemon's own timeouts, because the daemon's errors say more.
DEFAULT_TIMEOUT = 120.0
_LONGEST_TIMEOUT = 86_400.0
_LARGEST_FD = 2**31 - 1

_STATUSES = f"""\
environment:
  {SOCKET_VARIABLE}  the proxy's socket, unless --socket-path names it
  {GUEST_VARIABLE}   the settings of VMs that are started, unless --guest names them

exit status:
  run and exec exit with the process's own status. Apart from that:
  0      done
  2      wrong usage
  125    the proxy or the VM failed
  127    the agent refused to start the command
  128+N  signal N ended cc-proxyctl, or `run` passed it on and the process then ended
"""

Options = TypeVar("Options")


@dataclass(frozen=True)
class Subcommand(Generic[Options]):
    """One command: its place on the command line, and what it does."""

    name: str
    summary: str
    description: str
    #: Command lines without the leading `cc-proxyctl`.
    examples: tuple[str, ...]
    #: Functions that each add one or more arguments to the parser, in this order.
    arguments: tuple[Callable[[ArgumentParser], None], ...]
    #: Turns the parsed arguments into the command's options. Raises `Misuse`.
    read: Callable[[Namespace], Options]
    #: Returns the exit status.
    do: Callable[[Options], int]
    aliases: tuple[str, ...] = ()
    #: The usage line, where the one that argparse makes would be wrong.
    usage: str | None = None

    def main(self, args: Namespace) -> int:
        """Carry out a parsed command line; returns the exit status."""
        return self.do(self.read(args))


def build(commands: Sequence[Subcommand[Any]]) -> ArgumentParser:
    """Return the parser for a table of commands. Its namespace has `main`, that of the parsed command."""
    parser = ArgumentParser(
        prog="cc-proxyctl",
        description="Talk to cc-proxy by hand: run processes in VMs, send requests to VMs and to the proxy.",
        epilog=_STATUSES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cc-proxyctl {cc_proxy.__version__}")
    parser.add_argument(
        "--socket-path", metavar="PATH", help=f"the proxy's socket (default: {DEFAULT_SOCKET})"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        for name in (command.name, *command.aliases):
            _add_command(subparsers, name, command)
    return parser


def _add_command(
    subparsers: "argparse._SubParsersAction[ArgumentParser]", name: str, command: Subcommand[Any]
) -> None:
    """Add a command under one of its names. Each name has its own parser, so that help shows that name."""
    parser = subparsers.add_parser(
        name,
        help=command.summary,
        description=command.description,
        epilog="\n".join(("examples:", *(f"  cc-proxyctl {example}" for example in command.examples))),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=command.usage,
    )
    for add in command.arguments:
        add(parser)
    parser.set_defaults(main=command.main)


def add_id(parser: ArgumentParser) -> None:
    """Add the id of a VM, registered or about to be."""
    parser.add_argument(
        "id", metavar="ID", type=container_id, help="the container id under which the VM is registered"
    )


def add_timeout(parser: ArgumentParser) -> None:
    """Add the timeout of requests."""
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds,
        default=DEFAULT_TIMEOUT,
        help="seconds to wait for each answer from the proxy (default: %(default)g)",
    )


def add_sockets(parser: ArgumentParser, *, required: bool = True) -> None:
    """Add the two sockets of a VM."""
    parser.add_argument(
        "--ctl", metavar="PATH", type=text, required=required, help="the VM's control channel, a socket"
    )
    parser.add_argument(
        "--io", metavar="PATH", type=text, required=required, help="the VM's I/O channel, a socket"
    )


def add_console(parser: ArgumentParser) -> None:
    """Add the socket of a VM's console."""
    parser.add_argument(
        "--console",
        metavar="PATH",
        type=text,
        help="the VM's console, a socket: it shows why a VM does not boot; `cc-proxy -v 3` logs it all",
    )


def add_process(parser: ArgumentParser) -> None:
    """Add the options that describe a process, and its command line, which must come last."""
    add = parser.add_argument
    add("-t", "--tty", dest="terminal", action="store_true", help="give the process this terminal")
    add("-i", "--interactive", action="store_true", help="pass stdin on to the process")
    add(
        "-e",
        "--env",
        metavar="K=V",
        type=text,
        action="append",
        default=[],
        help="set an environment variable; K alone passes on this command's own value (repeatable)",
    )
    add(
        "-w",
        "--workdir",
        metavar="DIR",
        type=text,
        default="/",
        help="working directory (default: %(default)s)",
    )
    add("-u", "--user", metavar="USER[:GROUP]", type=text, default="", help="run as this user and group")
    add(
        "cmd",
        metavar="CMD",
        type=text,
        nargs=argparse.REMAINDER,
        help="the command to run, and its arguments",
    )


def text(value: str) -> str:
    """Check an argument that will be sent as JSON."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not valid UTF-8") from None
    return value


def container_id(value: str) -> str:
    """Check the id of a container. The proxy refuses an empty one, but does not say what is wrong with it."""
    if not value:
        raise argparse.ArgumentTypeError("a container id has at least one character")
    return text(value)


def new_id(value: str) -> str:
    """Check the id of a new container. Its length is limited because commands for the agent contain it."""
    if len(value) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(
            f"a container id has at most {LONGEST_TEXT} characters, this one has {len(value)}"
        )
    return container_id(value)


def seconds(value: str) -> float:
    """Parse a number of seconds."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= _LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"'{value}' is not a number of seconds: more than 0, and at most {_LONGEST_TIMEOUT:.0f}"
        )
    return number


def fd_number(value: str) -> int:
    """Parse the number of an fd."""
    if not (value.isascii() and value.isdecimal() and int(value) <= _LARGEST_FD):
        raise argparse.ArgumentTypeError(f"'{value}' is not the number of an fd")
    return int(value)
