"""What VMs have in memory, and that it goes back."""

import ctypes
import mmap
from pathlib import Path

from cc_proxy.proxy.memory import new_buffer


def mapping_at(address: int) -> str | None:
    """The permissions of the mapping that an address is in, or None if it is in none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return permissions
    return None


def address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_buffer_is_this_process_own_and_goes_back_with_the_last_reference() -> None:
    buffer = new_buffer(256 * 1024)
    address = address_of(buffer)
    view = memoryview(buffer)
    view[-3:] = b"end"
    assert mapping_at(address) == "rw-p"
    del buffer
    assert bytes(view[-3:]) == b"end"
    del view
    assert mapping_at(address) is None
