"""Lossless stdin (docs/protocol.md, 4): how much stdin a process may be sent at once. No I/O.

An agent keeps 512 bytes of stdin for each process and drops what does not fit. It answers a frame on a seq
that no process owns with an empty frame, once it has handled everything before it. Such a frame, sent after
the data, is a marker: when it comes back, there is room again.

A lossless agent keeps more, and says so: its markers come back with `LOSSLESS` as their payload.
"""

from typing import Self

from cc_proxy.api.frames import encode_frame
from cc_proxy.hyperstart.state import WindowState

#: Seqs from here on are markers, never streams.
FIRST_MARKER = 1 << 63
#: Seqs of streams are below 2^53.
_GENERATION_SHIFT = 53
_GENERATIONS = 1 << 10
_STREAM_MASK = (1 << _GENERATION_SHIFT) - 1

#: The payload of a marker that a lossless agent sends back. It also sends each new host one unasked.
LOSSLESS = b"\1"
#: Bytes of stdin that a lossless agent keeps for each process.
LOSSLESS_WINDOW = 64 * 1024

#: Once pings have been faster than a marker, they go out along with the next markers, until this many markers
#: in a row have come back. While output floods, only one in ten does.
MARKERS_TO_TRUST = 8
#: The most frames that can wait in the guest: a virtio-serial port has 128 buffers. This bounds the pings of
#: a round: without it, frames that are too short to need a marker would add up.
MOST_QUEUED = 128


def marked_stream(seq: int) -> int:
    """Return the stream that a marker belongs to."""
    return seq & _STREAM_MASK


class StdinWindow:
    """The window of one stream's stdin, as in TCP: how much may be sent before it is acknowledged.

    Payload is counted as it is sent. Once half the window is used up, a marker goes out, and nothing more is
    sent until it comes back. So typing does not take a marker per key.
    """

    def __init__(self, io_base: int, size: int) -> None:
        self._io_base = io_base
        self._size = size
        self._unacknowledged = 0
        #: Number of the marker that is on its way, or of the next one.
        self.generation = 0
        #: How often the marker on its way has been sent; 0 if none is on its way.
        self.asked = 0

    @classmethod
    def from_state(cls, io_base: int, state: WindowState) -> Self:
        """Return a window that goes on where another one of this stream stood."""
        window = cls(io_base, state.size)
        window._unacknowledged, window.generation = state.unacknowledged, state.generation
        window.asked = state.asked
        return window

    def state(self) -> WindowState:
        """Return what `from_state` needs."""
        return WindowState(self._size, self._unacknowledged, self.generation, self.asked)

    @property
    def room(self) -> int:
        """Payload bytes that may be sent now; 0 while a marker is on its way."""
        return 0 if self.asked else self._size - self._unacknowledged

    def widen(self, size: int) -> None:
        """Raise the window to `size`; does nothing if it is larger already."""
        self._size = max(self._size, size)

    def sent(self, payload_bytes: int) -> bytes | None:
        """Count payload that was sent. Returns a marker if one must be sent after it."""
        self._unacknowledged += payload_bytes
        if self._unacknowledged * 2 < self._size:
            return None
        self.asked = 1
        return self._marker()

    def ask_again(self) -> bytes:
        """Return the marker again, because it has not come back in time.

        Whichever copy comes back first counts: nothing was sent in between, so all of them mean the same.
        """
        self.asked += 1
        return self._marker()

    def echoed(self, seq: int) -> bool:
        """Take a marker that came back. Returns whether it makes room again."""
        if not self.asked or seq != self._seq:
            return False
        self.reset()
        return True

    def reset(self) -> None:
        """Start with an empty window. A marker that is still on its way no longer counts."""
        self._start_generation()
        self.asked = 0
        self._unacknowledged = 0

    def _start_generation(self) -> None:
        """Give the next marker another seq.

        A copy of an earlier marker may come back late. If it were taken for the next marker, the data before
        that one would count as handled.
        """
        self.generation = (self.generation + 1) % _GENERATIONS

    @property
    def _seq(self) -> int:
        return FIRST_MARKER + (self.generation << _GENERATION_SHIFT) + self._io_base

    def _marker(self) -> bytes:
        return encode_frame(self._seq)
