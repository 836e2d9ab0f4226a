"""System calls that the standard library lacks. All of them need root."""

import ctypes
import fcntl
import os
import socket
import struct

#: `mount`'s flags (<sys/mount.h>).
NOSUID, NODEV, NOEXEC, BIND, REC = 2, 4, 8, 4096, 16384
_DETACH = 2  # umount2's
_POWER_OFF = 0x4321FEDC
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("16sH22x")

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system. Raises `OSError`."""
    texts = [text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*texts, ctypes.c_ulong(flags), options.encode()), target)


def unmount(target: str) -> None:
    """Detach a file system, and those mounted in it; it goes once nothing uses it. Raises `OSError`."""
    _check(_libc.umount2(target.encode(), _DETACH), target)


def power_off() -> None:
    """Power the machine off at once. Raises `OSError`."""
    _check(_libc.reboot(_POWER_OFF), "power off")


def bring_up(interface: str) -> None:
    """Bring a network interface up. Raises `OSError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        name = interface.encode()
        _, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(name, 0)))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
