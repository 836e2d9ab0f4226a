"""The command line of QEMU. No I/O."""

from collections.abc import Mapping

from cc_proxy.ctl.vm.settings import QemuSettings

#: The sockets a VM has, as they are called in its directory, and QEMU's character devices. All but the
#: console's are QEMU's own.
CTL, IO, CONSOLE, QMP = SOCKETS = ("ctl", "io", "console", "qmp")
#: The ports of the two channels: their ids, and their names in the guest.
PORTS = {CTL: "sh.hyper.channel.0", IO: "sh.hyper.channel.1"}

#: `microvm` is the leanest. Without KVM it has no clock that Linux can rely on: on a busy host it may hang.
_MACHINES = {"kvm": "microvm", "tcg": "pc"}
_OPTIONS = {"microvm": "microvm,acpi=on", "q35": "q35", "pc": "pc"}
_NOTHING_ELSE = ("-nodefaults", "-no-user-config", "-display", "none")
#: When the kernel panics the VM ends at once: by a triple fault, as `microvm` has no other way.
_KERNEL = "console=ttyS0 quiet panic=-1 reboot=t"


def qemu_command(
    settings: QemuSettings, accelerator: str, listeners: Mapping[str, int], console: int
) -> list[str]:
    """Return the command that starts a VM, which waits for `cont` before it boots.

    `listeners` are fds of sockets that listen, by the names in `SOCKETS`. What comes from the guest's
    console goes to the fd `console`.
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
