"""Memory of VMs, which goes back to the system with them."""

import mmap


def new_buffer(size: int) -> mmap.mmap:
    """Return `size` bytes that last as long as there is a reference to them. Raises `OSError`.

    Once a bytearray of that size has been freed, malloc keeps the next ones in its arenas, of which it makes
    up to eight for each CPU; when VMs have come and gone for a while, megabytes of holes are left there.
    """
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
