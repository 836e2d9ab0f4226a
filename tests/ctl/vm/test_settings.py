"""Settings of VMs: what is taken, what is not, and what QEMU is started with."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from cc_proxy.ctl.errors import Failure
from cc_proxy.ctl.options import VM_OPTIONS, GuestOptions
from cc_proxy.ctl.vm.command import SOCKETS, qemu_command
from cc_proxy.ctl.vm.settings import QemuSettings, choose, load, parse
from cc_proxy.settingsfile import SettingsError

CONF = Path(__file__).parents[3] / "conf" / "guest.toml"
LISTENERS = {name: 10 + number for number, name in enumerate(SOCKETS)}


def test_shipped_settings_are_the_defaults_and_all_there_are() -> None:
    text = CONF.read_text()
    uncommented = re.sub(r"^#([a-z_]+ = )", r"\1", text, flags=re.MULTILINE)
    assert parse(text, "/etc/x") == parse(uncommented, "/etc/x") == QemuSettings()
    assert set(re.findall(r"^#([a-z_]+) = ", text, re.MULTILINE)) == set(QemuSettings.__struct_fields__)


def test_each_setting_has_an_option() -> None:
    assert set(VM_OPTIONS) == set(QemuSettings.__struct_fields__)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("memory = 0", "memory: expected an integer >= 1"),
        ('memory = "1G"', "memory: expected an integer, got a string"),
        ('machine = "virt"', "machine: expected one of auto, microvm, q35, pc, got 'virt'"),
        ("disk = 1", "unknown setting `disk`"),
        ("boot_timeout = 0", "boot_timeout: expected a number > 0.0"),
        ('image = ""', "image: expected a path"),
        ('kernel = "a\\u0000"', "kernel: expected a path"),
        ('append = "\\u0000"', "append: expected a string without NUL characters"),
        ('arguments = ["-s", "\\u0000"]', "arguments: expected a string without NUL characters"),
        ("=", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=f"^/etc/x: {re.escape(complaint)}"):
        parse(text, "/etc/x")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "guest.toml"
    file.write_text('kernel = "vmlinuz"\nimage = "/boot/initrd"\n')
    assert (load(str(file)).kernel, load(str(file)).image) == (f"{tmp_path}/vmlinuz", "/boot/initrd")


def test_a_file_that_is_named_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"guest\.toml: cannot be read: No such file or directory"):
        choose(GuestOptions(str(tmp_path / "guest.toml"), {}))


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "guest.toml"
    file.write_text("memory = 512\ncpus = 2\n")
    chosen = choose(GuestOptions(str(file), {"memory": 1024, "arguments": ["-s"]}))
    assert (chosen.memory, chosen.cpus, list(chosen.arguments)) == (1024, 2, ["-s"])


@pytest.mark.parametrize(
    ("machine", "accelerator", "options", "bus"),
    [
        ("auto", "kvm", "microvm,acpi=on", "virtio-serial-device"),
        ("auto", "tcg", "pc", "virtio-serial-pci"),
        ("q35", "kvm", "q35", "virtio-serial-pci"),
        ("microvm", "tcg", "microvm,acpi=on", "virtio-serial-device"),
    ],
)
def test_the_machine(machine: str, accelerator: str, options: str, bus: str) -> None:
    settings = msgspec.convert({"machine": machine}, QemuSettings)
    command = qemu_command(settings, accelerator, LISTENERS, 20)
    assert command[command.index("-machine") + 1] == options
    assert command[command.index("-accel") + 1] == accelerator
    assert bus in command


def test_what_the_user_adds_comes_last() -> None:
    settings = QemuSettings(append="loglevel=7", arguments=("-device", "virtio-rng-pci"), memory=300, cpus=3)
    command = qemu_command(settings, "kvm", LISTENERS, 20)
    assert command[-2:] == ["-device", "virtio-rng-pci"]
    assert command[command.index("-append") + 1].endswith(" loglevel=7")
    assert (command[command.index("-m") + 1], command[command.index("-smp") + 1]) == ("300M", "3")
