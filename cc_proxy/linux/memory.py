"""Memory that does not stay: neither what VMs had, nor holes between what is in use."""

import ctypes
import mmap

#: <malloc.h>
_M_ARENA_MAX = -8


def have_one_arena() -> None:
    """Have malloc take everything of this process from one arena, if it is glibc's. Before there are threads.

    It makes up to eight for each CPU, so that threads need not wait for each other. Here they have waited for
    the GIL already; and with connections coming and going, each arena gets holes of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def new_buffer(size: int) -> mmap.mmap:
    """Return `size` bytes that last as long as there is a reference to them. Raises `OSError`.

    A bytearray would be malloc's, which keeps the next ones in its arena once one has been freed; when VMs
    have come and gone for a while, megabytes of holes are left there.
    """
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
