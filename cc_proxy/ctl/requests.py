"""The agent's commands as typed values, encoded as the JSON it expects (docs/protocol.md, 2). No I/O."""

import msgspec

from cc_proxy.ctl.options import ProcessOptions

#: A process gets these unless the command line says otherwise: the agent may set none itself.
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEFAULT_TERM = "xterm"


class _Arguments(msgspec.Struct, frozen=True, rename="camel"):
    """The base of all commands' arguments."""


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
    """The size of a terminal, in characters."""

    rows: int
    columns: int


class HyperProcess(_Arguments, frozen=True, omit_defaults=True):
    """A process to start. The agent identifies it by the seqs of its streams."""

    terminal: bool
    stdio: int
    #: 0 with a terminal, which has no separate stderr.
    stderr: int
    args: tuple[str, ...]
    envs: tuple[EnvironmentVariable, ...]
    workdir: str
    user: str = ""
    group: str = ""
    rows: int = 0
    columns: int = 0


class NewContainer(_Arguments, frozen=True):
    """`newcontainer`: its root directory is shared/`image`/`rootfs`, its first process `process`."""

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
    """`killcontainer`: a signal for a container's first process, or for all its processes."""

    container: str
    signal: int
    all_processes: bool = False


class WinSize(_Arguments, frozen=True):
    """`winsize`."""

    seq: int
    row: int
    column: int


def hyper_process(process: ProcessOptions, io_base: int, size: WindowSize | None) -> HyperProcess:
    """Describe `process` for the agent. `size` is its terminal's, None without a terminal."""
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


def _environment(process: ProcessOptions) -> tuple[EnvironmentVariable, ...]:
    variables = {"PATH": _DEFAULT_PATH}
    if process.terminal:
        variables["TERM"] = _DEFAULT_TERM
    variables.update(process.env)
    return tuple(EnvironmentVariable(name, value) for name, value in variables.items())
