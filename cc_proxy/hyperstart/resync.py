"""Finding out where frames begin in what an agent sends, after a part of it was missed. No I/O.

Anything that looks like a header may be payload. But a frame has at most 10,240 bytes, so one begins
somewhere in the next 10,240 bytes, and another one where that ends. A false header leads, within a few
frames, to a place where no header is, or to the beginning of a real frame. So all candidates are followed
side by side until only one is left.
"""

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.hyperstart.frames import HEADER_SIZE, MAX_FROM_AGENT
from cc_proxy.hyperstart.pacing import FIRST_MARKER, LOSSLESS
from cc_proxy.hyperstart.state import ResyncState

_unpack_from = FRAME_HEADER.unpack_from
_LONGEST_MARKER = HEADER_SIZE + len(LOSSLESS)
#: Bytes of what was received that are kept: they may be the first part of a header.
_KEPT = HEADER_SIZE - 1


class Unrecognisable(Exception):
    """No place is left where a frame can begin."""


class Resync:
    """Looks for a place where a frame certainly begins. Which stream the bytes before it are on is unknown.

    A place is certain when no other is left, which takes some 10 to 20 KiB; or when the agent sends the probe
    back, a marker whose seq was drawn at random, so that nothing else has those bytes.

    It keeps 11 bytes, and a number for each place that is left.
    """

    def __init__(self, state: ResyncState) -> None:
        self.state = state
        self._probe = state.probe.to_bytes(8, "big")
        # Places are offsets from the first byte received.
        self._at = 0  # the next one to look at
        self._ahead: set[int] = set()  # where a frame may begin, besides all of the first MAX_FROM_AGENT
        self._tail = b""
        self._tail_at = 0

    def receive(self, data: bytes) -> bytes | None:
        """Take what the agent sent. Returns its end, from a certain frame on; None if none is certain yet.

        Do not call it again after it has returned something, or raised `Unrecognisable`.
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
        """Go on to the next place to look at; returns whether it is the only one left."""
        if self._at < MAX_FROM_AGENT:
            return False
        self._ahead = {place for place in self._ahead if place >= self._at}
        if not self._ahead:
            raise Unrecognisable
        self._at = min(self._ahead)
        return len(self._ahead) == 1

    def _length(self, data: bytes, at: int) -> int:
        """Return the length of the frame that may begin at this index; 0 if none can."""
        seq, length = _unpack_from(data, at)
        if seq >= FIRST_MARKER:
            longest = _LONGEST_MARKER
        else:
            longest = MAX_FROM_AGENT if seq < self.state.next_seq else 0
        return int(length) if HEADER_SIZE <= length <= longest else 0
