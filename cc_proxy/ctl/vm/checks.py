"""Checks, before a VM is started, that this machine has what it needs."""

import os
import shutil
from collections.abc import Mapping

from cc_proxy.ctl.errors import Failure, reason
from cc_proxy.ctl.vm.settings import QemuSettings

_KVM = "/dev/kvm"

#: The magic bytes of files, and their offsets: bzImage and ELF; cpio, plain or compressed as Linux accepts.
_KERNELS = {b"HdrS": 0x202, b"\x7fELF": 0}
_ARCHIVES = {
    b"0707": 0,
    b"\x1f\x8b": 0,  # gzip
    b"BZh": 0,
    b"\xfd7zXZ": 0,
    b"\x5d\0\0": 0,  # lzma
    b"\x89LZO": 0,
    b"\x02\x21\x4c\x18": 0,  # lz4
    b"\x28\xb5\x2f\xfd": 0,  # zstd
}
_MOST_READ = 1024

_GET_QEMU = "install it (Debian: apt-get install qemu-system-x86), or name another: --qemu"
_GET_GUEST = "install cc-proxy-guest, or run `make guest` in a checkout, or name another: --{0}"
#: What to do where KVM does not work.
WITHOUT_KVM = "do without KVM: --accelerator tcg"
_GET_RIGHTS = f"become root or a member of its group, or {WITHOUT_KVM}"
_GET_KVM = f"load the module kvm_intel or kvm_amd, or {WITHOUT_KVM}"


def check_files(settings: QemuSettings) -> None:
    """Check that QEMU, the kernel and the image are there. Raises `Failure`, which says what to do."""
    if not shutil.which(settings.qemu):
        raise Failure(f"{settings.qemu}: no program that can be run", hint=_GET_QEMU)
    _check_file(settings.kernel, _KERNELS, "a Linux kernel", _GET_GUEST.format("kernel"))
    _check_file(settings.image, _ARCHIVES, "an initramfs", _GET_GUEST.format("image"))


def _check_file(path: str, marks: Mapping[bytes, int], kind: str, hint: str) -> None:
    try:
        with open(path, "rb") as file:
            beginning = file.read(_MOST_READ)
    except OSError as error:
        raise Failure(f"{path}: {reason(error)}", hint=hint) from None
    if not any(beginning.startswith(mark, place) for mark, place in marks.items()):
        raise Failure(f"{path}: not {kind}", hint=hint)


def no_kvm(settings: QemuSettings) -> str:
    """Return why KVM cannot be used; empty if it can. Raises `Failure` instead if the settings require it."""
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text = f"{_KVM}: {reason(error)}"
        if settings.accelerator == "kvm":
            hint = _GET_RIGHTS if isinstance(error, PermissionError) else _GET_KVM
            raise Failure(text, hint=hint) from None
        return text
    return ""
