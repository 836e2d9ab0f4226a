"""The command line as typed values. No I/O except reading the environment.

Each class has a constructor `of` that reads argparse's namespace. It raises `Misuse` for what argparse cannot
check: options that make sense only together.
"""

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from cc_proxy.api import DEFAULT_SOCKET
from cc_proxy.ctl.errors import Misuse

#: The environment variable with the path of the proxy's socket, unless the command line gives one.
SOCKET_VARIABLE = "CC_PROXY_SOCKET"

_ID_BYTES = 6


@dataclass(frozen=True, slots=True)
class Proxy:
    """How to reach the proxy, and how many seconds it may take for each answer."""

    socket_path: str
    timeout: float

    @classmethod
    def of(cls, args: Namespace) -> Self:
        path = args.socket_path or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET
        return cls(path, args.timeout)


@dataclass(frozen=True, slots=True)
class Vm:
    """The sockets of a VM. The paths are absolute, because the proxy has its own working directory."""

    ctl: str
    io: str
    console: str = ""

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(os.path.abspath(args.ctl), os.path.abspath(args.io), _console(args))


@dataclass(frozen=True, slots=True)
class Process:
    """A process to start."""

    args: tuple[str, ...]
    terminal: bool = False
    interactive: bool = False
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = "/"
    user: str = ""
    group: str = ""

    @classmethod
    def of(cls, args: Namespace) -> Self:
        command = args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd
        if not command:
            raise Misuse("there is no command to start")
        user, _, group = args.user.partition(":")
        env = tuple(environment_variables(args.env, os.environ).items())
        return cls(tuple(command), args.terminal, args.interactive, env, args.workdir, user, group)


@dataclass(frozen=True, slots=True)
class Run:
    """`run`."""

    proxy: Proxy
    container_id: str
    #: None to use an embedded agent.
    vm: Vm | None
    console: str
    process: Process

    @classmethod
    def of(cls, args: Namespace) -> Self:
        if args.local and (args.ctl or args.io):
            raise Misuse("--local starts an agent with sockets of its own: no --ctl and --io")
        if not args.local and not (args.ctl and args.io):
            raise Misuse("run needs --local, or both --ctl and --io")
        container_id = os.urandom(_ID_BYTES).hex() if args.id is None else args.id
        vm = None if args.local else Vm.of(args)
        return cls(Proxy.of(args), container_id, vm, _console(args), Process.of(args))


@dataclass(frozen=True, slots=True)
class Exec:
    """`exec`."""

    proxy: Proxy
    container_id: str
    process: Process

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Proxy.of(args), args.id, Process.of(args))


@dataclass(frozen=True, slots=True)
class Hello:
    """`hello`."""

    proxy: Proxy
    container_id: str
    vm: Vm

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Proxy.of(args), args.id, Vm.of(args))


@dataclass(frozen=True, slots=True)
class Registered:
    """A command about a registered VM that needs nothing but its id: `attach`, `bye`."""

    proxy: Proxy
    container_id: str

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Proxy.of(args), args.id)


@dataclass(frozen=True, slots=True)
class Status:
    """`status`."""

    proxy: Proxy
    as_json: bool

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Proxy.of(args), args.json)


@dataclass(frozen=True, slots=True)
class LogLevel:
    """`log-level`."""

    proxy: Proxy
    level: str

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Proxy.of(args), args.level)


@dataclass(frozen=True, slots=True)
class Hyper:
    """`hyper`."""

    proxy: Proxy
    container_id: str
    name: str
    #: JSON text, or `-` to read it from stdin; None for a command without data.
    data: str | None

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Proxy.of(args), args.id, args.name, args.data)


@dataclass(frozen=True, slots=True)
class Agent:
    """`agent`."""

    vm: Vm
    ready_fd: int | None
    #: The directory to remove at the end; empty for none.
    remove: str

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(Vm(os.path.abspath(args.ctl), os.path.abspath(args.io)), args.ready_fd, args.remove)


def environment_variables(settings: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Read `NAME=VALUE`; and `NAME`, which takes its value from `environ` if it has one.

    Raises `Misuse` if there is no name.
    """
    variables = {}
    for setting in settings:
        name, given, value = setting.partition("=")
        if not name:
            raise Misuse(f"-e {setting}: a variable needs a name")
        if given or name in environ:
            variables[name] = value if given else environ[name]
    return variables


def _console(args: Namespace) -> str:
    return os.path.abspath(args.console) if args.console else ""
