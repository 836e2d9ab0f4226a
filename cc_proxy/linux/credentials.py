"""Who a client is, as the kernel says, and taking on that client's rights.

Linux keeps rights for each thread. The C library's functions, and so Python's, change all threads of a
process at once; here the system calls themselves are made, which change the one that calls.
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
#: Groups that a process may have (limits.h, NGROUPS_MAX), and those that fit into the most Python asks for.
_MOST_GROUPS = 65_536
_FEW_GROUPS = 256

_UNCHANGED = -1
_CAPABILITY_VERSION = 0x2008_0522
#: <sys/prctl.h>
_PR_SET_DUMPABLE, _PR_SET_NAME = 4, 15
#: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what makes root pass permissions of files.
_PAST_PERMISSIONS = 1 << 1 | 1 << 2

#: Numbers of setgroups, setresgid and setresuid; the first are those of all younger machines.
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
    """This process may not act as user `uid`; the text says why, and `errno` is the kernel's word for it."""

    def __init__(self, uid: int, number: int) -> None:
        machine = f"not known how on this machine ({platform.machine()})"
        cause = machine if number == errno.ENOSYS else os.strerror(number)
        super().__init__(f"the daemon cannot act as user {uid}: {cause}")
        self.errno = number


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a process is. The groups are the supplementary ones."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of_peer(cls, sock: socket.socket) -> "Credentials":
        """Return who connected a socket, or made it listen, as that process was then."""
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        pid, uid, gid = _PEERCRED.unpack(peer)
        return cls(pid, uid, gid, _peer_groups(sock))

    @classmethod
    def own(cls) -> "Credentials":
        """Return who the thread that asks is."""
        return cls(os.getpid(), os.geteuid(), os.getegid(), tuple(os.getgroups()))

    @property
    def all_groups(self) -> frozenset[int]:
        """The groups that count where something is for a group."""
        return frozenset((self.gid, *self.groups))


def become(who: Credentials) -> None:
    """Give the thread that calls the rights of `who` and no others, for good.

    A socket that it connects from then on tells the listener that the peer is `who`. If this process is root
    and so is `who`, there is nothing to give up. Raises `CannotAct`; the thread must not go on then.

    From then on the kernel lets `who` change the scheduling of this thread. Its real and saved ids stay what
    they were: by them it is decided who may send a signal to this process, or trace it.
    """
    if who.uid == os.geteuid() == ROOT:
        return
    try:
        setgroups, setresgid, setresuid = _calls()
        if set(os.getgroups()) != set(who.groups):  # it takes a capability even if nothing changes
            groups = array.array("I", who.groups)
            _call(_libc.syscall, setgroups, len(groups), ctypes.c_void_p(groups.buffer_info()[0]))
        _call(_libc.syscall, setresgid, _UNCHANGED, ctypes.c_uint(who.gid), _UNCHANGED)
        _call(_libc.syscall, setresuid, _UNCHANGED, ctypes.c_uint(who.uid), _UNCHANGED)
        _give_up_capabilities(_PAST_PERMISSIONS if who.uid == ROOT else 0)
        _check(who)
    except OSError as error:
        raise CannotAct(who.uid, error.errno or errno.EPERM) from None


def forbid_dumps() -> None:
    """Have the kernel write no core dump of this process, and let nobody but root look into it."""
    _call(_libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)


def name_process(name: str) -> None:
    """Give this process another name for `ps -o comm` and the like: 15 characters are seen. Main thread."""
    _call(_libc.prctl, _PR_SET_NAME, name.encode(), 0, 0, 0)


def _check(who: Credentials) -> None:
    """The last look: whoever wants the all-ones id, for one, has asked for no change."""
    now = Credentials.own()
    if (now.uid, now.gid, set(now.groups)) != (who.uid, who.gid, set(who.groups)):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _give_up_capabilities(kept: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable: the lower halves, then the upper.
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
