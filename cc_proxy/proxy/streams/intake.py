"""Reading in such a way that the next process can tell what was read, wherever this one is killed."""

import socket
from mmap import mmap

from cc_proxy.continuity.cells import BUSY, NO_CELL, READING, SEEKING, SIZE_AT, WHERE_AT, Cell
from cc_proxy.continuity.memory import STAMP
from cc_proxy.linux.fds import receive_into, unread

#: A batch of this many bytes is large: passing it on takes longer than waking a thread. Streams are steady,
#: so the next batch is likely to be large too.
LARGE = 16 * 1024


def read_noted(sock: socket.socket, room: memoryview, cell: Cell, place: int, large: bool) -> int:
    """Read once from a non-blocking socket and note it in a cell; returns how many bytes came, 0 at the end.

    `place` is the cell's `Reading`, of 0 bytes so far: it says where they will stand. With `large`, ask the
    kernel first how much will come, so that a kill in the middle leaves no doubt. Raises `BlockingIOError`
    if there is nothing for now, or another `OSError`.
    """
    if cell is NO_CELL:  # no other process will ask
        return receive_into(sock, room)
    size = 0
    coming = min(unread(sock), len(room)) if large else 0
    if coming >= len(STAMP):
        room = room[:coming]
        room[-len(STAMP) :] = STAMP
        cell[READING] = BUSY | place | coming << SIZE_AT
    else:
        cell[READING] = BUSY | place
    try:
        size = receive_into(sock, room)
    finally:
        cell[READING] = place | size << SIZE_AT
    return size


class Intake:
    """The buffer into which the VM's output is read. Frames stand between `start` and `stop`.

    One thread.
    """

    def __init__(self, io: socket.socket, buffer: mmap, cell: Cell) -> None:
        self._io = io
        self._cell = cell
        self.buffer = buffer
        self.view = memoryview(buffer)
        #: Where the first frame begins that has not been passed on, and where what was read ends.
        self.start = self.stop = 0
        self._last = 0

    @property
    def unfinished(self) -> bytes:
        """What has been read of a frame that has not arrived whole."""
        return bytes(self.view[self.start : self.stop])

    def restore(self, unfinished: bytes, *, seeking: bool) -> None:
        """Go on after `unfinished`, which had been read. With `seeking`, nobody knows where frames begin."""
        # SEEKING is set first or cleared last: after a kill in between, the next process looks for frames
        # once too often rather than once too seldom.
        self._cell[SEEKING] |= seeking
        self.start, self.stop = 0, len(unfinished)
        self.view[: self.stop] = unfinished
        self.passed_on()
        self._cell[SEEKING] = seeking

    def read(self) -> int:
        """Read once, after what is there; returns how many bytes came, 0 at end of file.

        All whole frames must have been passed on. Raises `BlockingIOError`, or another `OSError`.
        """
        if self.start == self.stop:
            self.start = self.stop = 0
            room = self.view
        else:
            room = self._room_behind()
        place = self.stop << WHERE_AT | self.start
        self._last = size = read_noted(self._io, room, self._cell, place, self._last >= LARGE)
        self.stop += size
        return size

    def read_rest(self) -> bytearray:
        """Read what has arrived by now, for the last time; returns a copy of it, after the unfinished frame.

        Raises `OSError`.
        """
        size = unread(self._io)
        rest = bytearray(self.buffer[self.start : self.stop])
        self.start = self.stop
        while size > 0 and (piece := self._io.recv(size)):
            rest += piece
            size -= len(piece)
        return rest

    def passed_on(self) -> None:
        """Note that all whole frames have been passed on."""
        self._cell[READING] = self.stop << WHERE_AT | self.start

    def _room_behind(self) -> memoryview:
        """Return the part of the buffer to read into, after an unfinished frame."""
        held = self.stop - self.start
        if held <= self.start:  # else a kill in the middle of the copy would leave neither whole
            self.buffer[:held] = self.buffer[self.start : self.stop]
            self.start, self.stop = 0, held
        return self.view[self.stop :]
