"""Finding out from the kernel who a client is, and taking on that client's rights.

In Linux each thread has its own rights. The functions of the C library, and so of Python, change those of all
threads at once. This module makes the system calls directly; they change only the thread that calls.
"""

import array
import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

ROOT = 0

_PEERCRED = struct.Struct("@iII")
_SO_PEERGROUPS = 59
#: The most groups a process may have (limits.h, NGROUPS_MAX), and the most that fit into Python's getsockopt.
_MOST_GROUPS = 65_536
_FEW_GROUPS = 256

_UNCHANGED = -1
_CAPABILITY_VERSION = 0x2008_0522
#: <sys/prctl.h>
_PR_SET_DUMPABLE, _PR_SET_NAME = 4, 15
#: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: they let root ignore file permissions.
_PAST_PERMISSIONS = 1 << 1 | 1 << 2

#: Numbers of setgroups, setresgid and setresuid. All newer architectures share the first set.
_COMMON = (159, 149, 147)
_CALLS = {
    "aarch64": _COMMON,
    "loongarch64": _COMMON,
    "ppc64le": (81, 169, 164),
    "riscv64": _COMMON,
    "s390x": (206, 210, 208),
    "x86_64": (116, 119, 117),
}

_libc = ctypes.CDLL(None, use_errno=True)


class CannotAct(Exception):
    """This process may not act as user `uid`; the text says why, and `errno` is the kernel's reason."""

    def __init__(self, uid: int, number: int) -> None:
        machine = f"not known how on this machine ({platform.machine()})"
        cause = machine if number == errno.ENOSYS else os.strerror(number)
        super().__init__(f"the daemon cannot act as user {uid}: {cause}")
        self.errno = number


@dataclass(frozen=True, slots=True)
class Credentials:
    """The identity of a process. `groups` are the supplementary ones."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of_peer(cls, sock: socket.socket) -> "Credentials":
        """Return the identity of the peer process, as it was when it called connect or listen."""
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        pid, uid, gid = _PEERCRED.unpack(peer)
        return cls(pid, uid, gid, _peer_groups(sock))

    @classmethod
    def own(cls) -> "Credentials":
        """Return the identity of the calling thread."""
        return cls(os.getpid(), os.geteuid(), os.getegid(), tuple(os.getgroups()))

    @property
    def all_groups(self) -> frozenset[int]:
        """The primary group and the supplementary ones."""
        return frozenset((self.gid, *self.groups))


def become(who: Credentials) -> None:
    """Give the calling thread the rights of `who` and no others, for good.

    A server that the thread then connects to sees `who` as its peer. If both this process and `who` are root,
    nothing changes. Raises `CannotAct`; the thread must do nothing else then.

    After this the kernel lets `who` change the scheduling of the thread. Its real and saved ids stay as they
    were; they decide who may signal or trace this process.
    """
    if who.uid == os.geteuid() == ROOT:
        return
    try:
        setgroups, setresgid, setresuid = _calls()
        if set(os.getgroups()) != set(who.groups):  # needs a capability even if nothing changes
            groups = array.array("I", who.groups)
            _call(_libc.syscall, setgroups, len(groups), ctypes.c_void_p(groups.buffer_info()[0]))
        _call(_libc.syscall, setresgid, _UNCHANGED, ctypes.c_uint(who.gid), _UNCHANGED)
        _call(_libc.syscall, setresuid, _UNCHANGED, ctypes.c_uint(who.uid), _UNCHANGED)
        _give_up_capabilities(_PAST_PERMISSIONS if who.uid == ROOT else 0)
        _check(who)
    except OSError as error:
        raise CannotAct(who.uid, error.errno or errno.EPERM) from None


def forbid_dumps() -> None:
    """Make the kernel write no core dump of this process, and let only root trace it."""
    _call(_libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)


def name_process(name: str) -> None:
    """Change this process's name in `ps -o comm` and the like; 15 characters at most. Main thread."""
    _call(_libc.prctl, _PR_SET_NAME, name.encode(), 0, 0, 0)


def _check(who: Credentials) -> None:
    """Check the result: the all-ones id, for one, asks the kernel for no change."""
    now = Credentials.own()
    if (now.uid, now.gid, set(now.groups)) != (who.uid, who.gid, set(who.groups)):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _give_up_capabilities(kept: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable: the lower 32 bits of each, then the upper.
    sets = (ctypes.c_uint32 * 6)()
    _call(_libc.capget, header, sets)
    kept &= sets[1]
    _call(_libc.capset, header, (ctypes.c_uint32 * 6)(kept, kept))


def _calls() -> tuple[int, int, int]:
    calls = _CALLS.get(platform.machine()) if sys.maxsize > 2**32 else None
    if calls is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return calls


def _call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _peer_groups(sock: socket.socket) -> tuple[int, ...]:
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _FEW_GROUPS * groups.itemsize))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return _many_peer_groups(sock)
    return tuple(groups)


def _many_peer_groups(sock: socket.socket) -> tuple[int, ...]:
    groups = (ctypes.c_uint32 * _MOST_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(groups))
    _call(_libc.getsockopt, sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(size))
    return tuple(groups[: size.value // ctypes.sizeof(ctypes.c_uint32)])
