"""Output of the I/O channel in batches (docs/protocol.md, 3). No I/O.

One pass over what a read has brought sorts it by the owners of its streams, into a few long slices of the
same buffer. No payload is copied.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from mmap import mmap
from operator import length_hint
from struct import iter_unpack
from typing import Generic, TypeVar

from cc_proxy.api.frames import FRAME_HEADER, MAX_FRAME

HEADER_SIZE = FRAME_HEADER.size
#: Longest frame that hyperstart reads on a virtio-serial I/O channel. A longer one breaks the channel.
MAX_TO_AGENT = 4096
#: Longest frame that hyperstart writes: its buffer.
MAX_FROM_AGENT = 10_240

#: Offset of the total length in a header.
_LENGTH_AT = 8
#: The most bytes in one slice of whole frames, unless a single frame is longer. A socket takes this much
#: whole or not at all (`linux.fds.taken_whole`).
MOST_IN_SLICE = 32 * 1024
#: A row is a run of frames that are equally long. Looking for one pays only if this many frames of that
#: length fit into the rest of the buffer.
ROW = 32
#: First only the frame this far ahead is compared: most of the time that shows that there is no row.
_GLANCE = 7

_pack = FRAME_HEADER.pack
_unpack_from = FRAME_HEADER.unpack_from

Owner = TypeVar("Owner")
#: The daemon reads into an mmap, tests and the fuzzer into a bytearray.
Buffer = bytearray | mmap


@dataclass(slots=True)
class Batch(Generic[Owner]):
    """What `gather` found in a buffer."""

    #: For each owner, slices of whole frames, in order.
    slices: dict[Owner, list[memoryview]] = field(default_factory=dict)
    #: Seq and total length of each frame that nobody owns.
    strays: list[tuple[int, int]] = field(default_factory=list)
    #: How many whole frames there are.
    frames: int = 0
    #: Where the first frame that has not arrived whole begins.
    stop: int = 0
    #: What is wrong with the frame at `stop`, if framing is lost there.
    error: str | None = None


class _Lists(Generic[Owner]):
    """Lists of slices by seq, so that each owner is looked up once. The seqs of one owner share a list."""

    def __init__(self, owners: Mapping[int, Owner], slices: dict[Owner, list[memoryview]]) -> None:
        self._owners = owners
        self._slices = slices
        self.strays: list[memoryview] = []
        self.by_seq: dict[int, list[memoryview]] = {}

    def add(self, seq: int) -> list[memoryview]:
        """Put the list for a seq into `by_seq`, and return it."""
        owner = self._owners.get(seq)
        self.by_seq[seq] = found = self.strays if owner is None else self._slices.setdefault(owner, [])
        return found


def gather(
    buffer: Buffer, view: memoryview, start: int, stop: int, owners: Mapping[int, Owner]
) -> Batch[Owner]:
    """Sort the whole frames in `buffer[start:stop]` by the owner of their seq.

    `view` is a memoryview of `buffer`, which the caller makes once. Neighbouring frames of one owner come
    out as one slice of it, of at most `MOST_IN_SLICE` bytes.
    """
    return _only_frame(buffer, view, start, stop, owners) or _sort(buffer, view, start, stop, owners)


def _only_frame(
    buffer: Buffer, view: memoryview, start: int, stop: int, owners: Mapping[int, Owner]
) -> Batch[Owner] | None:
    """Do what `gather` does for exactly one whole frame, as in interactive use, in half the time.

    Returns None for anything else.
    """
    if not HEADER_SIZE <= stop - start <= MAX_FRAME:
        return None
    seq, length = _unpack_from(buffer, start)
    if length != stop - start:
        return None
    owner = owners.get(seq)
    if owner is None:
        return Batch({}, [(seq, length)], 1, stop)
    return Batch({owner: [view[start:stop]]}, [], 1, stop)


def _sort(
    buffer: Buffer, view: memoryview, start: int, stop: int, owners: Mapping[int, Owner]
) -> Batch[Owner]:
    """Do what `gather` does for any number of frames."""
    batch: Batch[Owner] = Batch()
    lists = _Lists(owners, batch.slices)
    batch.frames, batch.stop = _walk(buffer, view, start, stop, lists)
    batch.strays = [header for piece in lists.strays for header in _headers(piece)]
    if stop - batch.stop >= HEADER_SIZE:
        seq, length = _unpack_from(buffer, batch.stop)
        if not HEADER_SIZE <= length <= MAX_FRAME:
            batch.error = f"a frame on stream {seq} with a total length of {length}"
    return batch


def _walk(  # noqa: C901 - one loop: a call for each frame would slow it down by half
    buffer: Buffer, view: memoryview, pos: int, stop: int, lists: _Lists[Owner]
) -> tuple[int, int]:
    """Add the frames from `pos` on to their lists. Returns how many there are, and where they end."""
    by_seq, pieces = lists.by_seq, lists.strays
    run = look_from = pos  # where the current slice begins; where to look for a row next
    seq = last_length = -1
    in_rows = 0
    edge = min(pos + MOST_IN_SLICE, stop)  # where the current slice must end
    last_header = stop - HEADER_SIZE
    # Its remaining length tells the number of turns at no cost; `frames += 1` would take time.
    turns = repeat(None, stop + 1)
    for _ in turns:
        if pos > last_header:
            break
        next_seq, length = _unpack_from(buffer, pos)
        end = pos + length
        if end > edge or length < HEADER_SIZE:  # every frame that is too long ends beyond the edge
            if end > stop or not HEADER_SIZE <= length <= MAX_FRAME:
                break
            if run < pos:
                pieces.append(view[run:pos])
            run, edge = pos, min(max(end, pos + MOST_IN_SLICE), stop)
        if length == last_length and pos >= look_from and stop - pos >= ROW * length:
            look_from = pos + ROW * length  # if there is no row here, do not look again right away
            count = alike(buffer, pos, length, stop, 0 if next_seq == seq else _LENGTH_AT)
            if count > 1:
                in_rows += count - 1
                end = pos + length * count
                state = seq if next_seq == seq else -1, pieces, run, edge
                seq, pieces, run, edge = _sort_row(view, pos, end, length, lists, state)
                pos, edge = end, min(edge, stop)
                continue
        if next_seq != seq:
            seq = next_seq
            next_pieces = by_seq.get(seq) or lists.add(seq)
            if next_pieces is not pieces:
                if run < pos:
                    pieces.append(view[run:pos])
                pieces, run = next_pieces, pos
        last_length = length
        pos = end
    if run < pos:
        pieces.append(view[run:pos])
    return stop - length_hint(turns) + in_rows, pos  # the last turn found no frame


def _sort_row(
    view: memoryview,
    pos: int,
    stop: int,
    length: int,
    lists: _Lists[Owner],
    state: tuple[int, list[memoryview], int, int],
) -> tuple[int, list[memoryview], int, int]:
    """Sort a row: only its seqs have to be unpacked, or nothing if all of them are the same.

    `state` is `_walk`'s: the seq that all frames have, or -1; the list that the current slice goes to, and
    where that slice begins and must end. Returns the new values, with the last frame's seq.
    """
    by_seq = lists.by_seq
    seq, pieces, run, edge = state
    of_one_seq = seq >= 0
    while True:
        end = min(stop, pos + (edge - pos) // length * length)
        if of_one_seq:
            pos = end
        else:
            for (seq,) in iter_unpack(f">Q{length - 8}x", view[pos:end]):
                next_pieces = by_seq.get(seq) or lists.add(seq)
                if next_pieces is not pieces:
                    if run < pos:
                        pieces.append(view[run:pos])
                    pieces, run = next_pieces, pos
                pos += length
        if pos == stop:
            return seq, pieces, run, edge
        pieces.append(view[run:pos])
        run, edge = pos, pos + max(MOST_IN_SLICE, length)


def frames_of(frames: memoryview) -> list[memoryview]:
    """Return each of these whole frames as a slice."""
    found, pos = [], 0
    for _, length in _headers(frames):
        found.append(frames[pos : pos + length])
        pos += length
    return found


def _headers(frames: memoryview) -> Iterator[tuple[int, int]]:
    """Yield the seq and total length of each frame. All of them must be whole."""
    pos = 0
    while pos < len(frames):
        seq, length = _unpack_from(frames, pos)
        yield seq, length
        pos += length


def alike(buffer: Buffer, pos: int, length: int, stop: int, first: int = 0) -> int:
    """Return how many whole frames in a row, from `pos` on, have the same header from byte `first` on.

    The headers of equally long frames form a table. Comparing one of its columns takes one call; unpacking
    would take one call for each frame. Streams of small writes consist of such rows. The table grows only
    while all of it is alike, so that the work stays in proportion to what is found.
    """
    header = buffer[pos + first : pos + HEADER_SIZE]
    ahead = pos + _GLANCE * length
    if buffer[ahead + first : ahead + HEADER_SIZE] != header:
        return 1
    found, rows = 0, ROW
    while True:
        looked_at = min(rows, (stop - pos) // length)
        alike = _rows_alike(header, buffer, pos + first, length, looked_at)
        found += alike
        if alike < rows:
            return found
        pos += alike * length
        rows *= 4


def _rows_alike(header: bytes | bytearray, buffer: Buffer, pos: int, length: int, rows: int) -> int:
    """Return how many headers in a row, `length` bytes apart, equal `header`; looks at `rows` of them."""
    for offset in range(len(header)):
        column = buffer[pos + offset : pos + rows * length : length]
        rows -= len(column.lstrip(header[offset : offset + 1]))
    return rows
