"""What is taken from memory, and that it goes back."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from cc_proxy.linux.memory import new_buffer


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


#: What glibc says of itself while threads, all at once, hold more than Python's own allocator serves.
ALLOCATE_IN_THREADS = """
import ctypes
import threading

from cc_proxy.linux.memory import have_one_arena

have_one_arena()
together = threading.Barrier(9)

def hold():
    held = bytearray(100_000)
    together.wait()
    together.wait()

threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
together.wait()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stream)
libc.fflush(stream)
together.wait()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="this C library is not glibc")
def test_all_threads_share_an_arena() -> None:
    told = subprocess.run([sys.executable, "-c", ALLOCATE_IN_THREADS], capture_output=True, check=True).stdout
    assert told.count(b"<heap nr=") == 1
