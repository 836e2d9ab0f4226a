"""The memory that a VM's pump reads into, which stays when the process is killed."""

from mmap import MAP_SHARED, mmap
from typing import NamedTuple

from cc_proxy.continuity.cells import NO_CELL, Cell
from cc_proxy.linux.memory import new_buffer

#: Bytes of each of a channel's two buffers.
BUFFER_SIZE = 256 * 1024
#: What is put where the last bytes will be read to. If it still stands there, none have been read.
STAMP = b"\xe9nobody\x17"


class Memory(NamedTuple):
    """What a channel works in: the buffers for what it reads, and its cell."""

    output: mmap
    stdin: mmap
    cell: Cell


def private_memory() -> Memory:
    """Return memory that goes with this process. Raises `OSError`."""
    return Memory(new_buffer(BUFFER_SIZE), new_buffer(BUFFER_SIZE), NO_CELL)


def shared_memory(fd: int, cell: Cell) -> Memory:
    """Return memory that stays for as long as anybody has `fd`, a memfd of twice `BUFFER_SIZE`.

    The fd stays the caller's, who may close it. Raises `OSError`.
    """
    output, stdin = (mmap(fd, BUFFER_SIZE, MAP_SHARED, offset=offset) for offset in (0, BUFFER_SIZE))
    return Memory(output, stdin, cell)
