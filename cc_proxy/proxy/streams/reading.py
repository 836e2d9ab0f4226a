"""Reading so that another process can tell what was read, wherever this one is killed."""

import socket

from cc_proxy.continuity.cells import BUSY, NO_CELL, READING, SIZE_AT, Cell
from cc_proxy.continuity.memory import STAMP
from cc_proxy.linux.fds import is_for_now, receive_into, unread

#: If a read brought this much, it pays to ask how much the next will bring: that leaves no doubt about it.
MUCH = 16 * 1024


def read_noted(sock: socket.socket, room: memoryview, cell: Cell, place: int, much: bool) -> int:
    """Read once from a non-blocking socket, and note it in a cell; returns how many bytes came, 0 at the end.

    `place` is a `Reading` of nothing so far; `much` says that the last one was of `MUCH`. Raises
    `BlockingIOError` if there is nothing for now, or another `OSError`.
    """
    if cell is NO_CELL:  # nobody will ask
        return receive_into(sock, room)
    coming = min(unread(sock), len(room)) if much else 0
    if coming >= len(STAMP):
        room = room[:coming]
        room[-len(STAMP) :] = STAMP
        cell[READING] = BUSY | place | coming << SIZE_AT
    else:
        cell[READING] = BUSY | place
    try:
        size = sock.recv_into(room)
    except OSError as error:
        cell[READING] = place
        if is_for_now(error):
            raise BlockingIOError from None
        raise
    cell[READING] = place | size << SIZE_AT
    return size
