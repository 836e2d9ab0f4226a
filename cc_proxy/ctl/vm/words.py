"""What a guest and its hypervisor said to the last, in a line. No I/O."""

import re

_PANIC = re.compile(r"Kernel panic - not syncing: .+")
#: The kernel's own lines begin with the time.
_KERNEL_LINE = re.compile(r"\[ *\d+\.\d+\] ")
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|.)")


def last_words(console: str) -> str:
    """Return why a guest ended, as far as its console tells: what its kernel panics about, and the last line
    of a program before that.
    """
    lines = list(filter(None, map(str.strip, _ESCAPE.sub("", console).splitlines())))
    programs = [line for line in lines if not _KERNEL_LINE.match(line) and not _PANIC.search(line)]
    if why := panic(console):
        return "; ".join([*programs[-1:], why])
    return next(iter(programs[-1:] or lines[-1:]), "")


def panic(console: str) -> str:
    """Return what a kernel panics about; nothing if it does not."""
    found = _PANIC.search(console)
    return found[0].strip() if found else ""


def first_complaint(errors: str) -> str:
    """Return what QEMU complained about first: what comes after it may be only a consequence."""
    lines = [line for line in errors.splitlines() if line.strip() and "warning:" not in line]
    return lines[0].strip() if lines else ""
