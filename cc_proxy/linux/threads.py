"""Starting threads, and going on with those there are, when memory may be short."""

import mmap
import threading

#: Bytes of address space that have to be free: a stack, and Python asks for memory a megabyte at a time.
_ROOM = 5 * 256 * 1024


def check_room() -> None:
    """Raise `RuntimeError` if there may be no memory for another thread. Any thread.

    Nor is there any for those that are there then, and Python does not always survive that: to call a
    function takes some.
    """
    try:
        mmap.mmap(-1, _ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise RuntimeError("no memory for another thread") from None


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises `RuntimeError` if there is none to be had, or no room for it. Any thread.

    One that finds no memory for its first steps ends before it can say that it has begun, and then
    `Thread.start` waits for that for ever.
    """
    check_room()
    thread.start()
