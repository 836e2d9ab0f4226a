"""Gives memory back to the system: buffers of VMs that have gone, and no holes between what is in use."""

import ctypes
import mmap

#: <malloc.h>
_M_ARENA_MAX = -8


def have_one_arena() -> None:
    """Make glibc's malloc use one arena for the whole process. Call it before there are threads.

    By default malloc makes up to eight arenas for each CPU, so that threads need not wait for each other.
    Here they have waited for the GIL already; and as connections come and go, each arena would get its own
    holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def new_buffer(size: int) -> mmap.mmap:
    """Return a buffer of `size` bytes that goes back to the system with its last reference. Raises `OSError`.

    A bytearray would come from malloc, which takes buffers from its arena once one of them has been freed.
    After VMs have come and gone for a while, megabytes of holes are left in the arena.
    """
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
