"""The settings of a VM: read from a TOML file, and overridden by the command line.

Every setting has a default; conf/guest.toml says what each setting is for.
"""

import os
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from cc_proxy import settingsfile
from cc_proxy.ctl.errors import Failure
from cc_proxy.ctl.options import GuestOptions
from cc_proxy.settingsfile import Path, SettingsError, SettingsTable, Text

#: Read if it exists and no other file is named.
DEFAULT_FILE = "/etc/cc-proxy/guest.toml"

Machine = Literal["auto", "microvm", "q35", "pc"]
Accelerator = Literal["auto", "kvm", "tcg"]
_CHOICES = {"machine": get_args(Machine), "accelerator": get_args(Accelerator)}

#: Where the package cc-proxy-guest installs the kernel and the image.
_GUEST = "/usr/lib/cc-proxy/guest"
#: In MiB.
MOST_MEMORY = 2**24
MOST_CPUS = 1024


class QemuSettings(SettingsTable, frozen=True):
    """How to start QEMU."""

    qemu: Path = "qemu-system-x86_64"
    machine: Machine = "auto"
    accelerator: Accelerator = "auto"
    #: MiB.
    memory: Annotated[int, Meta(ge=1, le=MOST_MEMORY)] = 256
    cpus: Annotated[int, Meta(ge=1, le=MOST_CPUS)] = 1
    kernel: Path = f"{_GUEST}/vmlinuz"
    image: Path = f"{_GUEST}/initramfs"
    #: Added to the kernel's command line.
    append: Text = ""
    #: Added to QEMU's command line.
    arguments: tuple[Text, ...] = ()
    #: In seconds.
    boot_timeout: Annotated[float, Meta(gt=0, le=86_400)] = 60.0


def parse(text: str, source: str) -> QemuSettings:
    """Return the settings that a TOML text describes. Raises `SettingsError`, naming `source` and the key.

    Relative paths of the kernel and the image start from the directory of `source`.
    """
    settings = settingsfile.decode(text, source, QemuSettings, _CHOICES)
    here = os.path.dirname(os.path.abspath(source))
    kernel, image = os.path.join(here, settings.kernel), os.path.join(here, settings.image)
    return msgspec.structs.replace(settings, kernel=kernel, image=image)


def load(path: str | None = None) -> QemuSettings:
    """Return the settings in `path`, else those in the default file if it exists, else the defaults.

    Raises `SettingsError` if the file cannot be read or has a mistake.
    """
    text = settingsfile.read(path or DEFAULT_FILE, optional=path is None)
    return QemuSettings() if text is None else parse(text, path or DEFAULT_FILE)


def choose(asked: GuestOptions) -> QemuSettings:
    """Return the settings from the file, overridden by the command line. Raises `Failure`."""
    try:
        return msgspec.structs.replace(load(asked.file), **asked.overrides)
    except SettingsError as error:
        raise Failure(str(error)) from None
