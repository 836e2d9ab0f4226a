"""Frames as log lines, shortened (`-v 2`)."""

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.log import IO, logger

_SHOWN = 48


def dump_frames(vm: str, direction: str, data: memoryview) -> None:
    """Log each whole frame in `data`: its stream, its size and how its payload begins."""
    if not logger.isEnabledFor(IO):
        return
    pos = 0
    while len(data) - pos >= FRAME_HEADER.size:
        seq, length = FRAME_HEADER.unpack_from(data, pos)
        if length < FRAME_HEADER.size:
            return
        payload = bytes(data[pos + FRAME_HEADER.size : pos + min(length, FRAME_HEADER.size + _SHOWN)])
        log_frame(vm, direction, seq, length - FRAME_HEADER.size, payload)
        pos += length


def log_frame(vm: str, direction: str, seq: int, size: int, begin: bytes) -> None:
    """Log one frame, whose payload of `size` bytes begins with `begin`."""
    shown = repr(begin)[1:] + ("…" if len(begin) < size else "")
    fields = {"vm": vm, "stream": seq, "direction": direction, "size": size, "payload": shown}
    logger.log(IO, "frame", extra=fields)
