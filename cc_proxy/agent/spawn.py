"""Starts the process that a command describes, on this host."""

import fcntl
import os
import resource
import struct
import subprocess
import termios
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from cc_proxy.agent.commands import EnvVar, ProcessSpec, Rlimit
from cc_proxy.agent.credentials import Identity, resolve
from cc_proxy.agent.errors import CommandRefused, MissingBinary

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_WINSIZE = struct.Struct("HHHH")
_LARGEST_LIMIT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Child:
    """A process that has begun to run its program, and the agent's ends of its streams.

    All fds are non-blocking. The caller of `spawn` owns them, and has to wait for the process.
    """

    popen: subprocess.Popen[bytes]
    #: Readable once the process has ended.
    pidfd: int
    stdin: int
    #: The fds to read its output from, each with the seq of its stream.
    outputs: dict[int, int]
    terminal: bool


def spawn(spec: ProcessSpec, root: str | None = None) -> Child:
    """Start a process in a session of its own, with `root` as its root directory if one is given.

    Raises `MissingBinary`, or `CommandRefused` for any other obstacle; no process is left then.
    """
    if not spec.args[0]:  # execvp would try directories of PATH
        raise MissingBinary("no program ''")
    workdir = spec.workdir or "/"
    if not os.path.isdir((root or "") + workdir):
        raise CommandRefused(f"no directory {workdir!r}")
    with ExitStack() as ours, ExitStack() as theirs:
        try:
            return _connected(spec, _Surroundings(root, workdir, resolve(spec, root)), _Fds(ours, theirs))
        except FileNotFoundError:
            raise MissingBinary(f"no program {spec.args[0]!r}") from None
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CommandRefused(f"{spec.args[0]!r}: {reason}") from None


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Set the size of a terminal; its foreground process group gets a SIGWINCH."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, _WINSIZE.pack(rows, columns, 0, 0))


class _Surroundings(NamedTuple):
    """What a process finds when it begins."""

    root: str | None
    workdir: str
    credentials: Identity | None


class _Fds:
    """Makes pipes and terminals. The child's ends are closed in any case, ours unless `keep` is called."""

    def __init__(self, ours: ExitStack, theirs: ExitStack) -> None:
        self._ours = ours
        self._theirs = theirs

    def output(self) -> tuple[int, int]:
        """Return our end and the child's of a pipe that the child writes to."""
        reader, writer = os.pipe()
        return self._own(reader, writer)

    def input(self) -> tuple[int, int]:
        """Return our end and the child's of a pipe that the child reads from."""
        reader, writer = os.pipe()
        return self._own(writer, reader)

    def terminal(self) -> tuple[int, int]:
        """Return our end and the child's of a terminal."""
        return self._own(*os.openpty())

    def duplicate(self, ours: int) -> int:
        """Return a duplicate of one of our fds."""
        copy = os.dup(ours)
        self._ours.callback(os.close, copy)
        return copy

    def keep(self) -> None:
        """Leave our ends open."""
        self._ours.pop_all()

    def _own(self, ours: int, theirs: int) -> tuple[int, int]:
        self._ours.callback(os.close, ours)
        self._theirs.callback(os.close, theirs)
        os.set_blocking(ours, False)
        return ours, theirs


def _connected(spec: ProcessSpec, around: _Surroundings, fds: _Fds) -> Child:
    if spec.terminal:
        master, child_stdin = fds.terminal()
        stdin, outputs, child_stdout = fds.duplicate(master), {master: spec.stdio}, child_stdin
        _prepare_terminal(child_stdin, spec, around.credentials)
    else:
        stdin, child_stdin = fds.input()
        reader, child_stdout = fds.output()
        outputs = {reader: spec.stdio}
    child_stderr = child_stdout
    if spec.stderr:
        reader, child_stderr = fds.output()
        outputs[reader] = spec.stderr
    popen = subprocess.Popen(
        spec.args,
        stdin=child_stdin,
        stdout=child_stdout,
        stderr=child_stderr,
        cwd=None if around.root else around.workdir,
        env=_environment(spec.envs, spec.terminal),
        start_new_session=True,
        # Safe while the agent is a program of its own, with one thread; None if there is nothing to do.
        preexec_fn=_preparation(spec, around),  # noqa: PLW1509
    )
    pidfd = _pidfd(popen)
    fds.keep()
    return Child(popen, pidfd, stdin, outputs, spec.terminal)


def _pidfd(popen: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(popen.pid)
    except OSError:
        popen.kill()
        popen.wait()
        raise


def _prepare_terminal(terminal: int, spec: ProcessSpec, credentials: Identity | None) -> None:
    if spec.rows or spec.columns:
        set_size(terminal, spec.rows, spec.columns)
    if credentials is not None:
        # The process must be able to open its terminal by name.
        os.fchown(terminal, credentials.uid, -1)


def _environment(envs: list[EnvVar], terminal: bool) -> dict[str, str]:
    """Return a process's environment: what the command gives it, and a few defaults."""
    base = {"PATH": _PATH, "HOME": "/"} | ({"TERM": "xterm"} if terminal else {})
    return base | {variable.env: variable.value for variable in envs}


def _preparation(spec: ProcessSpec, around: _Surroundings) -> Callable[[], None] | None:
    """Return what the child does between fork and exec; None if it has nothing to do.

    The credentials come last: raising limits and changing the root directory are privileges of root.
    """
    steps = [_limit_setter(limit) for limit in spec.rlimits]
    if spec.terminal:
        steps.append(_take_terminal)
    if around.root:
        steps.append(partial(_enter, around.root, around.workdir))
    if around.credentials is not None:
        steps.append(around.credentials.assume)
    return partial(_run_all, steps) if steps else None


def _run_all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _enter(root: str, workdir: str) -> None:
    os.chroot(root)
    os.chdir(workdir)


def _limit_setter(limit: Rlimit) -> Callable[[], None]:
    name = "RLIMIT_" + limit.type.upper().removeprefix("RLIMIT_")
    kind = getattr(resource, name, None)
    if not isinstance(kind, int):
        raise CommandRefused(f"no resource limit {limit.type!r}")
    return partial(resource.setrlimit, kind, (_limit(limit.soft), _limit(limit.hard)))


def _limit(value: int) -> int:
    """Return a limit in Python's terms: on the wire, a larger number than any limit means no limit."""
    return value if value <= _LARGEST_LIMIT else resource.RLIM_INFINITY
