"""The command line as typed values. No I/O, except that the environment is read.

Each class has a constructor `of` that reads argparse's namespace. It raises `Misuse` for what argparse cannot
check, such as options that make sense only together.
"""

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from cc_proxy.api import DEFAULT_SOCKET
from cc_proxy.ctl.errors import Misuse

#: The environment variable that names the proxy's socket, unless the command line does.
SOCKET_VARIABLE = "CC_PROXY_SOCKET"
#: The environment variable that names the file of VM settings, unless the command line does.
GUEST_VARIABLE = "CC_PROXY_GUEST"
#: The options that override VM settings, by the names of the settings.
VM_OPTIONS = {
    "qemu": "--qemu",
    "machine": "--machine",
    "accelerator": "--accelerator",
    "memory": "--memory",
    "cpus": "--cpus",
    "kernel": "--kernel",
    "image": "--image",
    "append": "--append",
    "arguments": "--qemu-arg",
    "boot_timeout": "--boot-timeout",
}

_ID_BYTES = 6


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """How to reach the proxy, and how many seconds it may take for each answer."""

    socket_path: str
    timeout: float

    @classmethod
    def of(cls, args: Namespace) -> Self:
        path = args.socket_path or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET
        return cls(path, args.timeout)


@dataclass(frozen=True, slots=True)
class VmSockets:
    """The sockets of a VM. The paths are absolute, because the proxy has its own working directory."""

    ctl: str
    io: str
    console: str = ""

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(os.path.abspath(args.ctl), os.path.abspath(args.io), _console(args))


@dataclass(frozen=True, slots=True)
class ProcessOptions:
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
        if not command[0]:
            raise Misuse("the command to start is empty: ''")
        user, _, group = args.user.partition(":")
        env = tuple(environment_variables(args.env, os.environ).items())
        return cls(tuple(command), args.terminal, args.interactive, env, args.workdir, user, group)


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What kind of VM to start."""

    #: A file of settings; None for the default one.
    file: str | None
    #: Settings from the command line, by their names.
    overrides: Mapping[str, object]

    @classmethod
    def of(cls, args: Namespace) -> Self:
        given = {name: getattr(args, name) for name in VM_OPTIONS}
        overrides = {name: value for name, value in given.items() if value is not None}
        return cls(args.guest or os.environ.get(GUEST_VARIABLE) or None, overrides)

    @staticmethod
    def refuse(args: Namespace) -> None:
        """Raise `Misuse` if the command line says how to start a VM."""
        for name, option in {"guest": "--guest", **VM_OPTIONS}.items():
            if getattr(args, name) is not None:
                raise Misuse(f"{option} says how to start a VM: it goes with `run --vm` or `vm start`")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """`run`."""

    proxy: ProxyOptions
    container_id: str
    #: None to use an embedded agent.
    vm: VmSockets | GuestOptions | None
    console: str
    process: ProcessOptions

    @classmethod
    def of(cls, args: Namespace) -> Self:
        container_id = os.urandom(_ID_BYTES).hex() if args.id is None else args.id
        return cls(
            ProxyOptions.of(args), container_id, _vm_to_run(args), _console(args), ProcessOptions.of(args)
        )


def _vm_to_run(args: Namespace) -> VmSockets | GuestOptions | None:
    if not args.vm:
        GuestOptions.refuse(args)
    if (args.local or args.vm) and (args.ctl or args.io):
        raise Misuse("--local and --vm have sockets of their own: no --ctl and --io")
    if args.local and args.vm:
        raise Misuse("--local starts an agent, --vm a VM: one of them")
    if args.vm:
        if args.console:
            raise Misuse("--vm has a console of its own: no --console")
        return GuestOptions.of(args)
    if args.local:
        return None
    if not (args.ctl and args.io):
        raise Misuse("run needs --local, --vm, or both --ctl and --io")
    return VmSockets.of(args)


@dataclass(frozen=True, slots=True)
class VmOptions:
    """`vm`."""

    proxy: ProxyOptions
    action: str
    container_id: str
    guest: GuestOptions

    @classmethod
    def of(cls, args: Namespace) -> Self:
        if args.action != "start":
            GuestOptions.refuse(args)
        return cls(ProxyOptions.of(args), args.action, args.id, GuestOptions.of(args))


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """`exec`."""

    proxy: ProxyOptions
    container_id: str
    process: ProcessOptions

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(ProxyOptions.of(args), args.id, ProcessOptions.of(args))


@dataclass(frozen=True, slots=True)
class HelloOptions:
    """`hello`."""

    proxy: ProxyOptions
    container_id: str
    vm: VmSockets

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(ProxyOptions.of(args), args.id, VmSockets.of(args))


@dataclass(frozen=True, slots=True)
class RegisteredOptions:
    """A command that needs nothing but the id of a registered VM: `attach`, `bye`."""

    proxy: ProxyOptions
    container_id: str

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(ProxyOptions.of(args), args.id)


@dataclass(frozen=True, slots=True)
class StatusOptions:
    """`status`."""

    proxy: ProxyOptions
    as_json: bool

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(ProxyOptions.of(args), args.json)


@dataclass(frozen=True, slots=True)
class LogLevelOptions:
    """`log-level`."""

    proxy: ProxyOptions
    level: str

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(ProxyOptions.of(args), args.level)


@dataclass(frozen=True, slots=True)
class HyperOptions:
    """`hyper`."""

    proxy: ProxyOptions
    container_id: str
    name: str
    #: JSON text, or `-` to read it from stdin; None for a command without data.
    data: str | None

    @classmethod
    def of(cls, args: Namespace) -> Self:
        return cls(ProxyOptions.of(args), args.id, args.name, args.data)


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """`agent`."""

    vm: VmSockets
    ready_fd: int | None
    #: The directory to remove at the end; empty to remove none.
    remove: str
    lossless: bool

    @classmethod
    def of(cls, args: Namespace) -> Self:
        vm = VmSockets(os.path.abspath(args.ctl), os.path.abspath(args.io))
        return cls(vm, args.ready_fd, args.remove, args.lossless)


def environment_variables(settings: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Parse settings of the form `NAME=VALUE`, or `NAME`, whose value is that in `environ`, if any.

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
