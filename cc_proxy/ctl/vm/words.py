"""Finds in the output of a guest, and of QEMU, the line that tells why it ended. No I/O."""

import re

_PANIC = re.compile(r"Kernel panic - not syncing: .+")
#: The kernel's own lines begin with a time.
_KERNEL_LINE = re.compile(r"\[ *\d+\.\d+\] ")
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|.)")


def last_words(console: str) -> str:
    """Return why a guest ended, as far as its console tells.

    That is a program's last line, followed by what the kernel panicked about, if it did.
    """
    lines = list(filter(None, map(str.strip, _ESCAPE.sub("", console).splitlines())))
    programs = [line for line in lines if not _KERNEL_LINE.match(line) and not _PANIC.search(line)]
    if why := panic(console):
        return "; ".join([*programs[-1:], why])
    return next(iter(programs[-1:] or lines[-1:]), "")


def panic(console: str) -> str:
    """Return what the kernel panicked about; empty if it did not."""
    found = _PANIC.search(console)
    return found[0].strip() if found else ""


def first_complaint(errors: str) -> str:
    """Return QEMU's first complaint, empty if there is none. Later ones may only be its consequences."""
    lines = [line for line in errors.splitlines() if line.strip() and "warning:" not in line]
    return lines[0].strip() if lines else ""
