"""Finding out where frames begin in what an agent sends, having missed a part of it. No I/O.

Whatever looks like a header may be payload. But a frame is 10,240 bytes long at the most, so a frame begins
somewhere in the next 10,240 bytes, and another where that one ends. What looks like a header anywhere else
leads, in a few steps, to something that is none, or to where a frame does begin. So all places are followed
side by side until only one is left.
"""

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.hyperstart.frames import HEADER_SIZE, MAX_FROM_AGENT
from cc_proxy.hyperstart.pacing import FIRST_MARKER, LOSSLESS
from cc_proxy.hyperstart.state import ResyncState

_unpack_from = FRAME_HEADER.unpack_from
_LONGEST_MARKER = HEADER_SIZE + len(LOSSLESS)
#: Bytes that are kept of what was received: a header may be cut.
_KEPT = HEADER_SIZE - 1


class Unrecognisable(Exception):
    """There is no place where a frame can begin."""


class Resync:
    """Looks for a place where a frame begins for certain; whose the bytes before it are, nobody can tell.

    Two things make it certain. No other place is left, which takes some 10 to 20 KiB. Or the agent sends the
    probe, a marker that was sent to it: its seq was drawn at random, so that nothing else has those bytes.

    It keeps 11 bytes, and a number for each place that is left.
    """

    def __init__(self, state: ResyncState) -> None:
        self.state = state
        self._probe = state.probe.to_bytes(8, "big")
        # All places are counted from the beginning of what is received.
        self._at = 0  # the next one to look at
        self._ahead: set[int] = set()  # those where a frame may begin, besides the first MAX_FROM_AGENT
        self._tail = b""
        self._tail_at = 0

    def receive(self, data: bytes) -> bytes | None:
        """Take what the agent sent. Returns the end of it that begins with a frame, or None if that is open.

        It is of no use after it has returned something, or raised `Unrecognisable`.
        """
        data, begin = self._tail + data, self._tail_at
        stop = begin + len(data)
        proved = data.find(self._probe)
        if proved >= 0:
            return data[proved:]
        while not self._is_certain() and self._at + HEADER_SIZE <= stop:
            length = self._length(data, self._at - begin)
            if length:
                self._ahead.add(self._at + length)
            self._at += 1
        if self._is_certain() and self._at <= stop:
            return data[self._at - begin :]
        self._tail = data[-_KEPT:]
        self._tail_at = stop - len(self._tail)
        return None

    def _is_certain(self) -> bool:
        """Go on to the next place; returns whether it is the only one that is left."""
        if self._at < MAX_FROM_AGENT:
            return False
        self._ahead = {place for place in self._ahead if place >= self._at}
        if not self._ahead:
            raise Unrecognisable
        self._at = min(self._ahead)
        return len(self._ahead) == 1

    def _length(self, data: bytes, at: int) -> int:
        """Return the length of the frame that may begin there; 0 if none can."""
        seq, length = _unpack_from(data, at)
        if seq >= FIRST_MARKER:
            longest = _LONGEST_MARKER
        else:
            longest = MAX_FROM_AGENT if seq < self.state.next_seq else 0
        return int(length) if HEADER_SIZE <= length <= longest else 0
