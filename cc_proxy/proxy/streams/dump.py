"""Frames as log lines, shortened (`-v 2`)."""

from collections.abc import Sequence

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.linux.fds import Piece
from cc_proxy.log.levels import IO, logger

_SHOWN = 48


def dump_frames(vm: str, direction: str, pieces: Sequence[Piece]) -> None:
    """Log each frame that `pieces` make up: its stream, its size and how its payload begins.

    Call it only if the log level asks for it: it is slow.
    """
    data = b"".join(pieces)
    pos = 0
    while pos < len(data):
        seq, length = FRAME_HEADER.unpack_from(data, pos)
        payload = data[pos + FRAME_HEADER.size : pos + length]
        shown = repr(payload[:_SHOWN])[1:] + ("…" if len(payload) > _SHOWN else "")
        fields = {"vm": vm, "stream": seq, "direction": direction, "size": len(payload), "payload": shown}
        logger.log(IO, "frame", extra=fields)
        pos += length
