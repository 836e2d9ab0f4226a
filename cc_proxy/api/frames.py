"""I/O frames, `[u64 seq][u32 total length][payload]`, for clients (docs/protocol.md, 3)."""

import struct
from typing import NamedTuple

from cc_proxy.api.errors import ProtocolError

#: Seq, and total length, this header included.
FRAME_HEADER = struct.Struct(">QI")
#: Longest frame that is accepted, header included.
MAX_FRAME = 64 * 1024


class Frame(NamedTuple):
    """One frame. An empty payload means end of file."""

    seq: int
    payload: bytes


def encode_frame(seq: int, payload: bytes | memoryview = b"") -> bytes:
    """Return a whole frame; without a payload it means end of file."""
    return b"".join((FRAME_HEADER.pack(seq, FRAME_HEADER.size + len(payload)), payload))


class FrameParser:
    """Splits a byte stream, which may arrive in arbitrary pieces, into frames.

    Holds one unfinished frame at most.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def receive_data(self, data: bytes) -> list[Frame]:
        """Take the next bytes of the stream; returns the frames that they complete.

        Raises `ProtocolError` for a total length under 12 or over `MAX_FRAME`; the stream is unusable after
        that.
        """
        buffer = self._buffer + data if self._buffer else data
        frames = []
        pos, stop = 0, len(buffer)
        while stop - pos >= FRAME_HEADER.size:
            seq, length = FRAME_HEADER.unpack_from(buffer, pos)
            if not FRAME_HEADER.size <= length <= MAX_FRAME:
                raise ProtocolError(f"a frame on stream {seq} with a total length of {length}")
            if length > stop - pos:
                break
            frames.append(Frame(seq, buffer[pos + FRAME_HEADER.size : pos + length]))
            pos += length
        self._buffer = buffer[pos:]
        return frames
