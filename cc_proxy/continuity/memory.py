"""The memory that a VM's pump reads into, which survives the process if it is killed."""

from mmap import MAP_SHARED, mmap
from typing import NamedTuple

from cc_proxy.continuity.cells import NO_CELL, Cell
from cc_proxy.linux.memory import new_buffer

#: Bytes of each of a channel's two buffers.
BUFFER_SIZE = 256 * 1024
#: Put where the last bytes of a read will stand. If it still stands there, nothing has been read.
STAMP = b"\xe9nobody\x17"


class Memory(NamedTuple):
    """A channel's buffers, into which it reads output and stdin, and its cell."""

    output: mmap
    stdin: mmap
    cell: Cell


def private_memory() -> Memory:
    """Return memory that ends with this process. Raises `OSError`."""
    return Memory(new_buffer(BUFFER_SIZE), new_buffer(BUFFER_SIZE), NO_CELL)


def shared_memory(fd: int, cell: Cell) -> Memory:
    """Return memory that stays as long as any process has `fd`, a memfd of twice `BUFFER_SIZE`.

    The fd stays the caller's, which may close it. Raises `OSError`.
    """
    output, stdin = (mmap(fd, BUFFER_SIZE, MAP_SHARED, offset=offset) for offset in (0, BUFFER_SIZE))
    return Memory(output, stdin, cell)
