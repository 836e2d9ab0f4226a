"""Sending in such a way that the next process can tell what was sent, whenever this one is killed."""

import ctypes
import functools
import os
import socket

_DONTWAIT = int(socket.MSG_DONTWAIT)


class _Piece(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_char_p), ("size", ctypes.c_size_t))

    address: int


@functools.lru_cache(maxsize=64)
def _piece(data: bytes) -> _Piece:
    """Return a shared, immutable piece: many responses are the same."""
    piece = _Piece(data, len(data))
    piece.address = ctypes.addressof(piece)
    return piece


class _Control(ctypes.Structure):
    """`struct cmsghdr`, and an fd."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("level", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("fd", ctypes.c_int),
    )


_CONTROL_END = _Control.fd.offset + _Control.fd.size

#: PyDLL keeps the GIL: nothing here waits, and getting it back may take longer than the call.
_sendmmsg = ctypes.PyDLL(None, use_errno=True).sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)

#: Words of 64 bits in a receipt, which is a `struct mmsghdr`. The kernel stores into the last one how many
#: bytes it has taken, and a process cannot be killed between the send and that.
WORDS = 8
_PIECES, _NUMBER_OF_PIECES, _CONTROL, _CONTROL_SIZE, _TAKEN = 2, 3, 4, 5, 7
#: Whether a receipt has this layout on this machine: only if its words have 64 bits.
FITS = ctypes.sizeof(ctypes.c_void_p) == ctypes.sizeof(ctypes.c_uint64)


class Receipt:
    """Sends, and has the kernel note in shared memory how much it took. One thread at a time."""

    __slots__ = ("_address", "_words")

    def __init__(self, words: memoryview) -> None:
        """`words` are `WORDS` of shared memory, all zero."""
        words[_NUMBER_OF_PIECES] = 1
        self._words = words
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(words))

    def clear(self) -> None:
        """Note that nothing has been sent."""
        self._words[_TAKEN] = 0

    def send(self, fd: int, data: bytes) -> None:
        """Send without waiting. `data` must be so short that a socket takes it whole or not at all.

        Raises `OSError`.
        """
        piece = _piece(data)
        self._words[_PIECES] = piece.address
        if _sendmmsg(fd, self._address, 1, _DONTWAIT) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def send_fd(self, fd: int, data: bytes, passed: int) -> None:
        """Do the same, and pass the fd `passed` along."""
        control = _Control(_CONTROL_END, socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)
        self._words[_CONTROL], self._words[_CONTROL_SIZE] = ctypes.addressof(control), _CONTROL_END
        try:
            self.send(fd, data)
        finally:
            self._words[_CONTROL_SIZE] = 0


def taken(words: memoryview) -> int:
    """Return how many bytes the last send took since the receipt in these words was cleared."""
    return ctypes.c_uint.from_buffer_copy(words, 8 * _TAKEN).value
