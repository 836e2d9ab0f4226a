"""What the agent does as the first process of a virtual machine, so that other processes can run there."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cc_proxy.agent import kernel
from cc_proxy.agent.errors import CommandRefused
from cc_proxy.agent.kernel import BIND, NODEV, NOEXEC, NOSUID, REC
from cc_proxy.agent.machine import ThisMachine

#: The hypervisor's names for the ports of the two channels.
PORTS = ("sh.hyper.channel.0", "sh.hyper.channel.1")

#: What to mount, unless something is mounted there: an initramfs may have done a part of it.
_MOUNTS = (
    ("proc", "/proc", NOSUID | NODEV | NOEXEC, ""),
    ("sysfs", "/sys", NOSUID | NODEV | NOEXEC, ""),
    ("devtmpfs", "/dev", NOSUID, "mode=755"),
    ("devpts", "/dev/pts", NOSUID | NOEXEC, "mode=620,gid=5,ptmxmode=666"),
    ("tmpfs", "/dev/shm", NOSUID | NODEV, "mode=1777"),  # noqa: S108
    ("tmpfs", "/run", NOSUID | NODEV, "mode=755"),
    ("tmpfs", "/tmp", NOSUID | NODEV, "mode=1777"),  # noqa: S108
    ("cgroup2", "/sys/fs/cgroup", NOSUID | NODEV | NOEXEC, ""),
)
#: What programs expect in /dev besides what the kernel puts there.
_LINKS = (("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2"))
_CONSOLE = "/dev/console"
_SHARE = "/run/cc-proxy/shared"
#: The virtio device id of a file system. Mounting without such a device makes the kernel log an error.
_VIRTIO_FS = 26
#: Linux's limit, in bytes.
_LONGEST_HOSTNAME = 64


class Guest(ThisMachine):
    """A virtual machine: a pod gives it a hostname, and may bring root directories for its containers.

    Those are in a directory that the hypervisor shares by virtiofs. Without one, containers have the agent's
    files.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._shares = False

    def start_pod(self, hostname: str, share: str) -> None:
        """Set the hostname, and mount what is shared."""
        if hostname:
            socket.sethostname(hostname.encode()[:_LONGEST_HOSTNAME].decode(errors="ignore"))
        if share and _has_device(_VIRTIO_FS):
            os.makedirs(_SHARE, 0o700, exist_ok=True)
            try:
                kernel.mount(share, _SHARE, "virtiofs")
                self._shares = True
            except OSError as error:
                self._say(f"nothing is shared as {share!r}: {error.strerror}")

    def end_pod(self) -> None:
        """Unmount what is shared: the next pod may have something else."""
        if self._shares:
            self._unmount(_SHARE)
            self._shares = False

    def make_root(self, image: str, rootfs: str, volumes: Sequence[object]) -> str | None:
        """Return a container's root directory, with /proc, /sys and /dev mounted in it.

        Refuses volumes: what the container wrote there would be lost.
        """
        if volumes:
            raise CommandRefused("fsmap has to be empty: this agent mounts no volumes")
        if not self._shares:
            return None
        root = os.path.realpath(f"{_SHARE}/{image}/{rootfs}")
        if not os.path.isdir(root):
            raise CommandRefused(f"no directory {image}/{rootfs} is shared")
        for kind, where, flags in (("proc", "proc", 0), ("sysfs", "sys", 0), ("/dev", "dev", BIND | REC)):
            target = os.path.join(root, where)
            try:
                os.makedirs(target, exist_ok=True)
                kernel.mount(kind, target, kind, flags)
            except OSError as error:  # programs may do without
                self._say(f"cannot mount {target}: {error.strerror}")
        return root

    def remove_root(self, root: str | None) -> None:
        """Unmount what `make_root` has mounted."""
        if root is not None:
            for where in ("proc", "sys", "dev"):
                self._unmount(os.path.join(root, where))

    def _unmount(self, target: str) -> None:
        try:
            kernel.unmount(target)
        except OSError as error:
            self._say(f"cannot unmount {target}: {error.strerror}")


def prepare(say: Callable[[str], None]) -> None:
    """Turn a bare kernel and an initramfs into a system that can run programs. Failures are only reported."""
    failed = [f"cannot mount {target}: {error.strerror}" for target, error in _mount_all()]
    _use_console()
    for text in failed:
        say(text)
    for name, target in _LINKS:
        with suppress(OSError):
            os.symlink(f"/proc/{target}", f"/dev/{name}")
    try:
        kernel.bring_up("lo")
    except OSError as error:
        say(f"cannot bring up lo: {error.strerror}")


def be_init(serve: Callable[[], None]) -> None:
    """Call `serve`, and power off, whatever it raises: the kernel panics if its first process ends."""
    try:
        serve()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os.sync()
        kernel.power_off()


def _mount_all() -> list[tuple[str, OSError]]:
    failed = []
    for kind, target, flags, options in _MOUNTS:
        try:
            if target not in _mount_points():
                os.makedirs(target, exist_ok=True)
                kernel.mount(kind, target, kind, flags, options)
        except OSError as error:
            failed.append((target, error))
    return failed


def _has_device(number: int) -> bool:
    """Whether the machine has a virtio device with this device id."""
    kinds = Path("/sys/bus/virtio/devices").glob("*/device")
    return any(int(file.read_text(), 16) == number for file in kinds)


def _mount_points() -> set[str]:
    try:
        return {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()}
    except FileNotFoundError:
        return set()


def _use_console() -> None:
    """Connect the standard streams to the console, if the kernel has not. Writing there must not block."""
    with suppress(OSError):
        fd = os.open(_CONSOLE, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        for standard in range(3):
            os.dup2(fd, standard)
        os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
