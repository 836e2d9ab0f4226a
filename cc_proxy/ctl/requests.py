"""What the agent is asked for, as the JSON it expects (docs/protocol.md, commands a pod needs). No I/O."""

import msgspec

from cc_proxy.ctl.options import Process

#: What a process gets unless it is told otherwise. Agents may give it nothing.
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEFAULT_TERM = "xterm"


class _Arguments(msgspec.Struct, frozen=True, rename="camel"):
    """Common shape of a command's arguments."""


class StartPod(_Arguments, frozen=True):
    """`startpod`."""

    hostname: str
    containers: tuple[()] = ()
    share_dir: str = "rootfs"
    interfaces: tuple[()] = ()
    routes: tuple[()] = ()


class EnvironmentVariable(_Arguments, frozen=True):
    """One of a process's environment variables."""

    env: str
    value: str


class WindowSize(msgspec.Struct, frozen=True):
    """How many characters a terminal shows."""

    rows: int
    columns: int


class HyperProcess(_Arguments, frozen=True, omit_defaults=True):
    """A process to be. Its agent knows it by the streams it has."""

    terminal: bool
    stdio: int
    #: 0 for a terminal, which has no stderr of its own.
    stderr: int
    args: tuple[str, ...]
    envs: tuple[EnvironmentVariable, ...]
    workdir: str
    user: str = ""
    group: str = ""
    rows: int = 0
    columns: int = 0


class NewContainer(_Arguments, frozen=True):
    """`newcontainer`: its root is shared/`image`/`rootfs`, and it starts `process`."""

    id: str
    image: str
    process: HyperProcess
    rootfs: str = "rootfs"
    fsmap: tuple[()] = ()
    restart_policy: str = "never"
    initialize: bool = False


class ExecCmd(_Arguments, frozen=True):
    """`execcmd`."""

    container: str
    process: HyperProcess


class KillContainer(_Arguments, frozen=True, omit_defaults=True):
    """`killcontainer`: a signal for a container's first process, or for everything in it."""

    container: str
    signal: int
    all_processes: bool = False


class WinSize(_Arguments, frozen=True):
    """`winsize`."""

    seq: int
    row: int
    column: int


def hyper_process(process: Process, io_base: int, size: WindowSize | None) -> HyperProcess:
    """Describe `process` to the agent; `size` is its terminal's, None if it has none."""
    return HyperProcess(
        terminal=process.terminal,
        stdio=io_base,
        stderr=0 if process.terminal else io_base + 1,
        args=process.args,
        envs=_environment(process),
        workdir=process.workdir,
        user=process.user,
        group=process.group,
        rows=size.rows if size else 0,
        columns=size.columns if size else 0,
    )


def _environment(process: Process) -> tuple[EnvironmentVariable, ...]:
    variables = {"PATH": _DEFAULT_PATH}
    if process.terminal:
        variables["TERM"] = _DEFAULT_TERM
    variables.update(process.env)
    return tuple(EnvironmentVariable(name, value) for name, value in variables.items())
