"""A virtio-serial port, as a guest sees it: a character device, with or without a host at its other end."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from cc_proxy.agent.errors import CannotListen
from cc_proxy.agent.loop import HANG_UP, ONCE, WRITE, Loop, Turn
from cc_proxy.agent.ports import Port
from cc_proxy.linux.fds import Piece, cut

#: The most bytes that the kernel takes in one write. When a host goes, whole writes that it has not read are
#: lost.
_MOST_WRITTEN = 32 * 1024
#: Seconds until the ports must exist, and between two looks: the kernel finds them one by one.
_PATIENCE, _INTERVAL = 10.0, 0.01


def find_ports(
    names: Sequence[str],
    patience: float = _PATIENCE,
    sysfs: Path = Path("/sys/class/virtio-ports"),
    devices: Path = Path("/dev"),
) -> list[str]:
    """Return the paths of the ports with these names, without udev.

    Raises `CannotListen` if one of them is still missing after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        found = {file.read_text().strip(): devices / file.parent.name for file in sysfs.glob("*/name")}
        missing = [name for name in names if name not in found]
        if not missing:
            return [str(found[name]) for name in names]
        if time.monotonic() >= deadline:
            there = ", ".join(sorted(filter(None, found))) or "none at all"
            raise CannotListen(
                f"no virtio-serial port is called {missing[0]} (there are: {there}): give the hypervisor "
                f"a virtserialport with name={missing[0]}"
            )
        time.sleep(_INTERVAL)


class VirtioPort(Port):
    """The port with the device at `path`. Raises `CannotListen`, for one if another process has it open.

    While there is no host, the device is always readable and hung up, so it is watched only for changes. If a
    host goes and another comes in one round of the loop, they are taken for one.
    """

    def __init__(self, loop: Loop, path: str, turn: Turn) -> None:
        super().__init__(loop, turn)
        try:
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise CannotListen(f"{path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the device. May be called more than once."""
        fd, self._fd, self._host = self._fd, None, None
        if fd is not None:
            self._loop.forget(fd)
            os.close(fd)

    def _await_host(self) -> None:
        if self._fd is not None:
            self._loop.watch(self._fd, WRITE | ONCE, self._look, self._turn)

    def _look(self, events: int) -> None:
        if self._fd is not None and not events & HANG_UP:
            self._take_host(self._fd)

    def _read(self, host: int, size: int) -> bytes:
        return os.read(host, size)

    def _write(self, host: int, pieces: Sequence[Piece]) -> Sequence[Piece]:
        while pieces:
            count = size = 0
            while count < len(pieces) and (not count or size + len(pieces[count]) <= _MOST_WRITTEN):
                size += len(pieces[count])
                count += 1
            try:
                sent = os.write(host, pieces[0] if count == 1 else b"".join(pieces[:count]))
            except BlockingIOError:
                return pieces
            pieces = pieces[count:] if sent == size else cut(pieces, sent)
        return pieces

    def _hang_up(self) -> None:
        pass
