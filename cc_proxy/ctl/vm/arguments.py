"""The command line options that say what kind of VM to start. No I/O."""

import argparse
from argparse import ArgumentParser
from collections.abc import Callable
from typing import get_args

from cc_proxy.ctl.options import GUEST_VARIABLE
from cc_proxy.ctl.parser import seconds, text
from cc_proxy.ctl.vm.settings import DEFAULT_FILE, MOST_CPUS, MOST_MEMORY, Accelerator, Machine, QemuSettings

_DEFAULTS = QemuSettings()


def add_vm_settings(parser: ArgumentParser) -> None:
    """Add one option for each setting of a VM, and one for the file of settings."""
    group = parser.add_argument_group(f"VM options, each of which overrides a setting in {DEFAULT_FILE}")
    add = group.add_argument
    add(
        "--guest",
        metavar="FILE",
        type=text,
        help=f"another file of settings (or set {GUEST_VARIABLE})",
    )
    add("--machine", choices=get_args(Machine), help="the machine (auto: microvm with KVM, pc without)")
    add("--accelerator", choices=get_args(Accelerator), help="auto: KVM if it works, else emulation (tcg)")
    add(
        "--memory",
        metavar="MIB",
        type=_count(MOST_MEMORY),
        help=f"MiB of memory (default: {_DEFAULTS.memory})",
    )
    add("--cpus", metavar="N", type=_count(MOST_CPUS), help=f"number of CPUs (default: {_DEFAULTS.cpus})")
    add("--kernel", metavar="PATH", type=text, help=f"the kernel (default: {_DEFAULTS.kernel})")
    add(
        "--image",
        metavar="PATH",
        type=text,
        help=f"the initramfs (default: {_DEFAULTS.image})",
    )
    add("--append", metavar="TEXT", type=text, help="more of the kernel's command line")
    add("--qemu", metavar="PATH", type=text, help=f"the hypervisor (default: {_DEFAULTS.qemu})")
    add(
        "--qemu-arg", metavar="ARG", dest="arguments", type=text, action="append",
        help="one more argument for it: --qemu-arg=-device --qemu-arg=... (repeatable)",
    )  # fmt: skip
    add(
        "--boot-timeout", metavar="S", type=seconds,
        help=f"seconds until the guest has to be up (default: {_DEFAULTS.boot_timeout:g})",
    )  # fmt: skip


def _count(most: int) -> Callable[[str], int]:
    """Return a function that parses a number from 1 to `most`."""

    def parse(value: str) -> int:
        if not (value.isascii() and value.isdecimal() and 0 < int(value) <= most):
            raise argparse.ArgumentTypeError(f"'{value}' is not a number from 1 to {most}")
        return int(value)

    return parse
