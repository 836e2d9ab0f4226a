"""A file system that never answers, as NFS without its server: whoever looks for something there hangs."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from pathlib import Path
from typing import Self

import pytest

_libc = ctypes.CDLL(None, use_errno=True)

_IN_HEADER = struct.Struct("=IIQQIIII")
_OUT_HEADER = struct.Struct("=IiQ")
_INIT = 26
#: Protocol 7.31, and nothing that is optional.
_INIT_ANSWER = struct.pack("=IIIIHHIIHHI28x", 7, 31, 65_536, 0, 12, 9, 65_536, 1, 32, 0, 0)
_MNT_DETACH = 2


class HangingMount:
    """A FUSE mount at `path`, open to all. What waits for it cannot be killed, until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _libc.mount(b"hanging", os.fsencode(path), b"fuse", 0, options.encode()):
            os.close(self._fd)
            pytest.skip(f"no FUSE here: {os.strerror(ctypes.get_errno())}")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        os.close(self._fd)  # what waits gets an error

    def _read(self) -> None:
        """Take in whatever is asked, and answer no more than makes it a mount."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while not self._over.is_set():
            if poll.poll(10):
                request = os.read(self._fd, 1 << 20)
                _, operation, unique, *_ = _IN_HEADER.unpack_from(request)
                if operation == _INIT:
                    size = _OUT_HEADER.size + len(_INIT_ANSWER)
                    os.write(self._fd, _OUT_HEADER.pack(size, 0, unique) + _INIT_ANSWER)
