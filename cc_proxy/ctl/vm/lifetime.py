"""A VM that runs as long as a command needs it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cc_proxy.ctl.errors import Failure
from cc_proxy.ctl.signals import Signals
from cc_proxy.ctl.vm.boot import BootWatch, QemuFailed
from cc_proxy.ctl.vm.checks import WITHOUT_KVM, check_files, no_kvm
from cc_proxy.ctl.vm.directory import InUse, VmDirectory
from cc_proxy.ctl.vm.machine import Machine
from cc_proxy.ctl.vm.settings import QemuSettings

_SLOWER = "the VM is emulated, which is slower"


@contextmanager
def virtual_machine(signals: Signals, settings: QemuSettings, container_id: str) -> Iterator[Machine]:
    """Start a VM and wait until it has booted; it ends with the context, unless it is kept (`Machine.keep`).

    Raises `Failure` if it does not boot, `Interrupted` if a signal comes first. If a `Failure` is raised
    inside and the VM has ended, the reason for that becomes the hint of the failure.
    """
    check_files(settings)
    reason = "" if settings.accelerator == "tcg" else no_kvm(settings)
    accelerator = "tcg" if reason else settings.accelerator.replace("auto", "kvm")
    note = f"{reason}: {_SLOWER}" if reason else ""
    with ExitStack() as stack:
        try:
            machine = stack.enter_context(_booted(signals, settings, container_id, accelerator, note))
        except QemuFailed as error:
            if accelerator == "tcg":
                raise
            if settings.accelerator == "kvm":
                raise Failure(str(error), hint=WITHOUT_KVM) from None
            # KVM may be there without working, for instance in a VM.
            note = f"KVM does not work ({error.complaint}): {_SLOWER}"
            machine = stack.enter_context(_booted(signals, settings, container_id, "tcg", note))
        try:
            yield machine
        except Failure as failure:
            raise machine.explain(failure) from None


@contextmanager
def _booted(
    signals: Signals, settings: QemuSettings, container_id: str, accelerator: str, note: str
) -> Iterator[Machine]:
    try:
        directory = VmDirectory.make(container_id)
    except InUse:
        hint = f"`cc-proxyctl vm stop {container_id}` ends it"
        raise Failure(f"{container_id}: a VM with this id runs already", hint=hint) from None
    machine = Machine(directory, settings, accelerator)
    try:
        with signals.may_interrupt():
            BootWatch(machine, note, _advice(settings, accelerator)).wait(settings.boot_timeout)
        yield machine
    finally:
        machine.end(signals)


def _advice(settings: QemuSettings, accelerator: str) -> str:
    """Return what to do if a VM hangs while it boots; empty if nothing makes a VM of this kind likely to."""
    if accelerator == "kvm":
        return f"{WITHOUT_KVM}; or wait longer: --boot-timeout"
    return "microvm may hang without KVM: --machine pc" if settings.machine == "microvm" else ""
