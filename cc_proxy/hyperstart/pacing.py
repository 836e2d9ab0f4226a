"""Lossless stdin (docs/protocol.md): how much of a process's stdin may be on its way at once. No I/O.

An agent keeps 512 bytes of stdin for each process and throws away what does not fit. A frame on a seq that
no process owns comes back as an empty frame once everything before it was handled: sent behind the
data, such a marker says that there is room again.
"""

from cc_proxy.api.frames import encode_frame

#: Seqs from here on are markers' and never a stream's.
FIRST_MARKER = 1 << 63
#: Seqs are below 2^53.
_GENERATION_SHIFT = 53
_GENERATIONS = 1 << 10
_STREAM_MASK = (1 << _GENERATION_SHIFT) - 1


def marked_stream(seq: int) -> int:
    """Return the stream that a marker's seq stands for."""
    return seq & _STREAM_MASK


class StdinWindow:
    """The window of one stream's stdin.

    Payload is counted as it is sent. Once half the window is used up a marker goes out and nothing more is
    sent until it is back; typing, which never comes near, costs no marker a key.
    """

    def __init__(self, io_base: int, size: int) -> None:
        self._io_base = io_base
        self._size = size
        self._unacknowledged = 0
        self._generation = 0
        #: Whether a marker is on its way, and how often it has been sent.
        self.asked = 0

    @property
    def room(self) -> int:
        """Payload bytes that may be sent now; 0 while a marker is on its way."""
        return 0 if self.asked else self._size - self._unacknowledged

    def sent(self, payload_bytes: int) -> bytes | None:
        """Count what was sent. Returns a marker if one has to be sent behind it."""
        self._unacknowledged += payload_bytes
        if self._unacknowledged * 2 < self._size:
            return None
        self.asked = 1
        return self._marker()

    def ask_again(self) -> bytes:
        """Return the same marker again, as it did not come back; whichever does first counts.

        Nothing was sent in between, so each of them says the same.
        """
        self.asked += 1
        return self._marker()

    def echoed(self, seq: int) -> bool:
        """Take a marker that came back. Returns whether there is room again because of it."""
        if not self.asked or seq != self._seq:
            return False
        self.reset()
        return True

    def reset(self) -> None:
        """Begin anew; a marker that is still on its way does not count any more."""
        self._be_another()
        self.asked = 0
        self._unacknowledged = 0

    def _be_another(self) -> None:
        """Have the next marker have another seq.

        Those that are still on their way may come back late: were one taken for the next, data in front of
        that would count as handled.
        """
        self._generation = (self._generation + 1) % _GENERATIONS

    @property
    def _seq(self) -> int:
        return FIRST_MARKER + (self._generation << _GENERATION_SHIFT) + self._io_base

    def _marker(self) -> bytes:
        return encode_frame(self._seq)
