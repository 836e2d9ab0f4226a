"""Giving memory back to the system: the buffers of VMs that have gone, without holes left in the heap."""

import ctypes
import mmap

#: <malloc.h>
_M_ARENA_MAX = -8


def have_one_arena() -> None:
    """Make glibc's malloc use one arena for the whole process. Call it before there are threads.

    By default malloc makes up to eight arenas for each CPU, so that threads need not wait for each other.
    Here they wait for the GIL anyway; and as connections come and go, each arena would get its own holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def new_buffer(size: int) -> mmap.mmap:
    """Return a buffer of `size` bytes that goes back to the system with its last reference. Raises `OSError`.

    A bytearray comes from malloc, which takes buffers of this size from its arena once it has freed one. As
    VMs come and go, that leaves megabytes of holes in the arena.
    """
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
