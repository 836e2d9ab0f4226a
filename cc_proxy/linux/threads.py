"""Starting threads when memory may be short."""

import mmap
import threading

#: Bytes of address space for each thread's stack. Little of it is ever touched, and there may be thousands.
STACK_SIZE = 512 * 1024
#: Bytes of address space that must be free: a stack, and a megabyte, Python's unit of allocation.
_ROOM = STACK_SIZE + 1024 * 1024


def check_room() -> None:
    """Raise `RuntimeError` if there may be no memory for another thread. Any thread.

    The other threads are short of memory then, too, and Python does not always survive that: even a function
    call takes some.
    """
    try:
        mmap.mmap(-1, _ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise RuntimeError("no memory for another thread") from None


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises `RuntimeError` if that is impossible, or memory is short. Any thread.

    If a thread finds no memory for its first steps, it ends before it can announce that it has begun, and
    `Thread.start` waits for that announcement for ever.
    """
    check_room()
    thread.start()
