"""What the generators send, and how they check what arrives. No I/O.

A stream is a cycle of frames that repeats. No two frames of a cycle are alike, and no frame is like one of
another stream. So a chunk that arrives is right if, and only if, it equals the cycle at its place. That takes
one `memcmp` for each chunk, whatever the size of its frames, and leaves no byte unchecked.
"""

import random
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

from cc_proxy.api import encode_frame
from cc_proxy.api.frames import FRAME_HEADER

#: The most bytes that are read or sent at once.
BUFFER_SIZE = 256 * 1024
#: Frames with seqs from here on are the proxy's markers, which an agent sends back (docs/protocol.md).
FIRST_MARKER = 1 << 63
#: Longest frame that an agent takes (docs/protocol.md, 3).
MAX_TO_AGENT = 4096
#: What a neighbour is sent while echoes are timed: frames as long as hyperstart's, and how many per second.
NEIGHBOUR_PAYLOAD = 10_228
NEIGHBOUR_FRAMES = 64
NEIGHBOUR_RATE = 1000

_CYCLE_SIZE = 1024 * 1024
_LEAST_READ = 16 * 1024
_STAMP = struct.Struct(">HHI")
_NOISE = random.Random(1).randbytes(64 * 1024)


class WrongBytesError(Exception):
    """What arrived differs from what was sent. The text says where."""


def frames_in_cycle(streams: int, payload: int) -> int:
    """Return how many frames of each stream are in a cycle, given the number of streams."""
    return max(4, _CYCLE_SIZE // (streams * (payload + FRAME_HEADER.size)))


def payload_of(vm: int, seq: int, number: int, size: int) -> bytes:
    """Return the payload of frame `number` of a stream. It is unique if it has 8 bytes or more."""
    start = (vm * 31 + seq * 7919 + number * 104_729) % (len(_NOISE) - size)
    return (_STAMP.pack(vm, seq, number) + _NOISE[start : start + size])[:size]


@lru_cache(maxsize=64)
def cycle_of(vm: int, seqs: tuple[int, ...], payload: int, frames: int) -> bytes:
    """Return one cycle: `frames` frames of each of a VM's streams `seqs`, taking the streams in turn."""
    return b"".join(
        encode_frame(seq, payload_of(vm, seq, number, payload)) for number in range(frames) for seq in seqs
    )


class StreamCheck:
    """Checks a stream that must arrive unchanged: a cycle that repeats `cycles` times."""

    def __init__(self, name: str, cycle: bytes, cycles: int) -> None:
        self._name = name
        self._period = len(cycle)
        self._total = self.left = len(cycle) * cycles
        #: How much may be read at once.
        self.read_size = min(max(len(cycle), _LEAST_READ), BUFFER_SIZE)
        # Long enough to contain in one piece whatever may be read at once.
        self._expected = repeated(cycle, self.read_size)

    def take(self, data: memoryview) -> None:
        """Check the next bytes, at most `read_size` of them. Raises `WrongBytesError`."""
        at = self._total - self.left
        if len(data) > self.left:
            raise WrongBytesError(f"{self._name}: more than the {self._total} bytes that were sent")
        if not self._expected.startswith(data, at % self._period):
            at += matching(self._expected, at % self._period, data, 1)
            raise WrongBytesError(f"{self._name}: byte {at} of {self._total} is not what was sent")
        self.left -= len(data)


class _Stdin:
    """Checks what one client sends, behind a proxy: the payload is the same, but frames may be split."""

    def __init__(self, name: str, cycle: bytes, payload: int, cycles: int) -> None:
        self._name = name
        frames = range(0, len(cycle), payload + FRAME_HEADER.size)
        payloads = [cycle[at + FRAME_HEADER.size : at + FRAME_HEADER.size + payload] for at in frames]
        seq, _ = FRAME_HEADER.unpack_from(cycle)
        self._size = payload
        self._payload = repeated(b"".join(payloads), MAX_TO_AGENT)
        self._period = payload * len(payloads)
        wire = [b"".join(split(seq, piece)) for piece in payloads]
        #: Length of a client's frame if it was split for no other reason than that it is long.
        self._unit = len(wire[0])
        self._wire = repeated(b"".join(wire), BUFFER_SIZE)
        self._total = self.left = self._period * cycles

    def run(self, view: memoryview) -> int:
        """Check whole frames of the client at the beginning of `view`; returns how many bytes were right."""
        at = self._total - self.left
        if at % self._size:
            return 0
        most = min(len(view), self.left // self._size * self._unit)
        begin = at % self._period // self._size * self._unit
        same = matching(self._wire, begin, view[: most - most % self._unit], self._unit)
        self.left -= same // self._unit * self._size
        return same

    def take(self, payload: memoryview) -> None:
        at = self._total - self.left
        if len(payload) > self.left:
            raise WrongBytesError(f"{self._name}: more than the {self._total} bytes that were sent")
        if not self._payload.startswith(payload, at % self._period):
            raise WrongBytesError(f"{self._name}: wrong bytes between {at} and {at + len(payload)}")
        self.left -= len(payload)


class StdinCheck:
    """Checks what a VM gets from all its clients at once, in frames that an agent can take."""

    def __init__(self, cycles_of: Mapping[int, bytes], payload: int, cycles: int) -> None:
        self._streams = {
            seq: _Stdin(f"stdin of stream {seq}", cycle, payload, cycles) for seq, cycle in cycles_of.items()
        }
        #: Markers that came, to be sent back.
        self.markers: list[bytes] = []

    @property
    def left(self) -> int:
        """How many bytes of payload are still to come."""
        return sum(stream.left for stream in self._streams.values())

    def take(self, buffer: bytearray, view: memoryview, stop: int) -> int:
        """Check the whole frames in `buffer[:stop]`, of which `view` is a view; returns where they end.

        Raises `WrongBytesError`.
        """
        at = 0
        while stop - at >= FRAME_HEADER.size:
            seq, length = FRAME_HEADER.unpack_from(buffer, at)
            size = self._run(seq, view[at:stop]) or self._single(seq, length, view[at:stop])
            if not size:
                break
            at += size
        return at

    def _run(self, seq: int, view: memoryview) -> int:
        stream = self._streams.get(seq)
        return stream.run(view) if stream else 0

    def _single(self, seq: int, length: int, view: memoryview) -> int:
        """Check one frame; returns its size, or 0 if it has not arrived whole."""
        if not FRAME_HEADER.size <= length <= MAX_TO_AGENT:
            raise WrongBytesError(f"stdin: a frame with a total length of {length}")
        if length > len(view):
            return 0
        if seq >= FIRST_MARKER and length == FRAME_HEADER.size:
            self.markers.append(bytes(view[:length]))
        elif seq in self._streams:
            self._streams[seq].take(view[FRAME_HEADER.size : length])
        else:
            raise WrongBytesError(f"stdin: a frame on stream {seq}, which is nobody's")
        return length


def split(seq: int, payload: bytes) -> Sequence[bytes]:
    """Return the frames in which a client's frame reaches the agent, if the proxy got all of it at once."""
    room = MAX_TO_AGENT - FRAME_HEADER.size
    return [encode_frame(seq, payload[at : at + room]) for at in range(0, len(payload), room)]


def repeated(cycle: bytes, size: int) -> bytes:
    """Return the cycle, repeated until any `size` bytes of the stream are in it in one piece."""
    return cycle * (1 + -(-size // len(cycle)))


def matching(expected: bytes, begin: int, view: memoryview, unit: int) -> int:
    """Return how many bytes of `view`, in whole units, equal `expected` from `begin` on."""
    if not expected.startswith(view[:unit], begin):
        return 0
    if expected.startswith(view, begin):
        return len(view)
    good, bad = 1, len(view) // unit + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if expected.startswith(view[good * unit : middle * unit], begin + good * unit):
            good = middle
        else:
            bad = middle
    return good * unit
