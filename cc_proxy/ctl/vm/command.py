"""QEMU's command line. No I/O."""

from collections.abc import Mapping

from cc_proxy.ctl.vm.settings import QemuSettings

#: The names of a VM's sockets in its directory, and of QEMU's character devices. QEMU listens on all of the
#: sockets except the console's, on which the keeper does.
CTL, IO, CONSOLE, QMP = SOCKETS = ("ctl", "io", "console", "qmp")
#: The virtio ports of the two channels: their ids, and their names in the guest.
PORTS = {CTL: "sh.hyper.channel.0", IO: "sh.hyper.channel.1"}

#: The machine for each accelerator. `microvm` is the leanest, but without KVM it has no clock that Linux can
#: rely on, and may hang on a busy host.
_MACHINES = {"kvm": "microvm", "tcg": "pc"}
_OPTIONS = {"microvm": "microvm,acpi=on", "q35": "q35", "pc": "pc"}
_NOTHING_ELSE = ("-nodefaults", "-no-user-config", "-display", "none")
#: The VM ends at once when the kernel panics. It does so by a triple fault: `microvm` has no other way.
_KERNEL = "console=ttyS0 quiet panic=-1 reboot=t"


def qemu_command(
    settings: QemuSettings, accelerator: str, listeners: Mapping[str, int], console: int
) -> list[str]:
    """Return the command that starts a VM. The VM boots when it gets `cont` on QMP.

    `listeners` are the fds of listening sockets, by the names in `SOCKETS`. The guest's console writes to the
    fd `console`.
    """
    machine = _MACHINES[accelerator] if settings.machine == "auto" else settings.machine
    bus = "virtio-serial-device" if machine == "microvm" else "virtio-serial-pci"
    command = [settings.qemu, *_NOTHING_ELSE, "-no-reboot", "-S"]
    command += ["-machine", _OPTIONS[machine], "-accel", accelerator, "-cpu", "max"]
    command += ["-m", f"{settings.memory}M", "-smp", str(settings.cpus)]
    command += ["-kernel", settings.kernel, "-initrd", settings.image]
    command += ["-append", f"{_KERNEL} {settings.append}".rstrip()]
    for name, fd in listeners.items():
        command += ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]
    command += ["-chardev", f"file,id={CONSOLE},path=/dev/fd/{console}"]
    command += ["-mon", f"chardev={QMP},mode=control", "-serial", f"chardev:{CONSOLE}", "-device", bus]
    for port, name in PORTS.items():
        command += ["-device", f"virtserialport,id={port},chardev={port},name={name}"]
    return [*command, *settings.arguments]
