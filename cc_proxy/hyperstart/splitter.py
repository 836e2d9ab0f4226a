"""Stdin of the I/O channel in batches (docs/protocol.md, 3 and 4). No I/O."""

from collections.abc import Iterator, Sequence

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.hyperstart.frames import HEADER_SIZE, MAX_TO_AGENT, MOST_IN_SLICE, ROW, Buffer, alike
from cc_proxy.hyperstart.state import SplitterState

_ROOM = MAX_TO_AGENT - HEADER_SIZE
#: The length in the header of an empty frame.
_EMPTY_LENGTH = HEADER_SIZE.to_bytes(4, "big")
_LENGTH_AT = 8
# The bits of a `word`. The lower 32 are the payload bytes still missing, or an unfinished header's length.
_BEGUN_AT = 32  # four bits: how many bytes of an unfinished header there are
_SAID_AT = 36  # whether there was any payload
_AT_EOF_AT = 37
_WRONG_AT = 38  # whether the seq in the unfinished header is not the client's
_ALL_BITS = (1 << 64) - 1

_pack = FRAME_HEADER.pack
_unpack_from = FRAME_HEADER.unpack_from


def state_of(io_base: int, word: int) -> SplitterState:
    """Return the state that a splitter's `word` stands for. Its counters are only 0 or not."""
    begun, rest = word >> _BEGUN_AT & 0xF, word & 0xFFFF_FFFF
    said = word >> _SAID_AT & 1
    header, missing = b"", rest
    if begun:
        other = word >> _WRONG_AT & 1  # any other seq will do: the frame is refused whichever it has
        header, missing = _pack(io_base ^ -other & _ALL_BITS, rest)[:begun], 0
    return SplitterState(header, missing, said, said, bool(word >> _AT_EOF_AT & 1))


def whole_frames(pieces: Sequence[bytes | memoryview], count: int) -> int:
    """Return how many of the first `count` pieces are whole frames: all, unless the last is a header alone.

    The pieces come from `StdinSplitter.split`, perhaps with other whole frames in between.
    """
    last = pieces[count - 1]
    if isinstance(last, bytes) and len(last) == HEADER_SIZE and not last.endswith(_EMPTY_LENGTH):
        return count - 1
    return count


class StdinSplitter:
    """Turns what one client sends into frames that its agent can take, as a few long slices of the buffer.

    Frames of up to `MAX_TO_AGENT` bytes that arrive whole pass unchanged. The payload of a longer frame, or
    of one that is still arriving, is passed on in new frames. So only an unfinished header is ever held back.
    """

    def __init__(self, io_base: int) -> None:
        self._io_base = io_base
        self._full_header = _pack(io_base, MAX_TO_AGENT)
        self._header = b""
        self._missing = 0
        #: Payload bytes handed out so far.
        self.payload_bytes = 0
        #: Frames handed out so far. A long frame counts as the frames it was split into.
        self.frames = 0
        #: Whether the last frame handed out was end of file.
        self.at_eof = False
        #: Where `join` is to join long frames: the beginning and the end of the rest of a frame's payload.
        self.joints: list[tuple[int, int]] = []
        #: What the client sent and may not send; nothing is handed out after it.
        self.error: str | None = None

    def state(self) -> SplitterState:
        """Return what `restore` needs."""
        return SplitterState(self._header, self._missing, self.payload_bytes, self.frames, self.at_eof)

    def word(self) -> int:
        """Return the state as a 40-bit number for `state_of`, without the counters."""
        word = self._missing | bool(self.payload_bytes) << _SAID_AT | self.at_eof << _AT_EOF_AT
        return word | self._begun() if self._header else word

    def _begun(self) -> int:
        begun = self._header
        wrong = begun[:_LENGTH_AT] != self._full_header[: min(len(begun), _LENGTH_AT)]
        length = int.from_bytes(begun[_LENGTH_AT:].ljust(4, b"\0"), "big")
        return length | len(begun) << _BEGUN_AT | wrong << _WRONG_AT

    def restore(self, state: SplitterState) -> None:
        """Go on where another splitter of this stream stood."""
        self._header, self._missing = state.header, state.missing
        self.payload_bytes, self.frames, self.at_eof = state.payload_bytes, state.frames, state.at_eof

    def split(self, buffer: Buffer, view: memoryview, start: int, stop: int) -> list[bytes | memoryview]:
        """Turn `buffer[start:stop]` into pieces to be written to the agent one after the other.

        `view` is a memoryview of `buffer`. Call `join` with it before using the pieces. A frame on a seq
        other than the client's own, or with a total length under 12, sets `error`; neither that frame nor
        anything after it is in the pieces.

        A piece may be empty. It has at most `MOST_IN_SLICE` bytes, and ends where a frame ends, unless it is
        a header alone, before its payload (`whole_frames`).
        """
        pieces: list[bytes | memoryview] = []
        pos = self._pass_only_frame(buffer, view, start, stop, pieces)
        while pos < stop and self.error is None:
            if self._missing:
                pos = self._frame_anew(buffer, view, pos, stop, pieces)
            elif self._header or stop - pos < HEADER_SIZE:
                pos = self._collect_header(buffer, pos, stop, pieces)
            else:
                pos = self._pass_frames(buffer, view, pos, stop, pieces)
        return pieces

    def join(self, view: memoryview) -> None:
        """Change the buffer that `split` was given, in the places where long frames are joined.

        Until then it is as the client sent it, so that another process can split it once more.
        """
        for left, end in self.joints:
            view[left : end + HEADER_SIZE] = self._full_header + view[left:end].tobytes()
        self.joints.clear()

    def _pass_only_frame(
        self, buffer: Buffer, view: memoryview, start: int, stop: int, pieces: list[bytes | memoryview]
    ) -> int:
        """Pass exactly one whole, short frame, as in interactive use. Returns where it ends, or `start`."""
        if not HEADER_SIZE <= stop - start <= MAX_TO_AGENT or self._missing or self._header or self.error:
            return start
        if _unpack_from(buffer, start) != (self._io_base, stop - start):
            return start
        pieces.append(view[start:stop])
        self.payload_bytes += stop - start - HEADER_SIZE
        self.frames += 1
        self.at_eof = stop - start == HEADER_SIZE
        return stop

    def _pass_frames(
        self, buffer: Buffer, view: memoryview, start: int, stop: int, pieces: list[bytes | memoryview]
    ) -> int:
        """Pass frames that are whole and short enough, and begin the payload of the first that is not.

        It may stop earlier, once there are enough for a slice. Returns where it stopped.
        """
        pos = row = start
        frames, last_length, begun = 0, -1, 0
        last_header = min(stop - HEADER_SIZE, start + MOST_IN_SLICE - MAX_TO_AGENT)
        while pos <= last_header:
            seq, length = _unpack_from(buffer, pos)
            if length == last_length and stop - pos >= ROW * length and seq == self._io_base:
                count = alike(buffer, pos, length, stop)
                row, pos = pos, pos + length * count
                frames += count
                continue
            if not self._allowed(seq, length):
                break
            if length > MAX_TO_AGENT or length > stop - pos:
                begun = HEADER_SIZE
                self._missing = length - HEADER_SIZE
                break
            last_length = length
            frames += 1
            pos += length
        if pos > start:
            if pos - start <= MOST_IN_SLICE:
                pieces.append(view[start:pos])
            else:  # only a row at the end can make it longer
                pieces += (view[start:row], *_in_slices(view[row:pos], last_length))
            self.payload_bytes += pos - start - frames * HEADER_SIZE
            self.frames += frames
            self.at_eof = last_length == HEADER_SIZE
        return pos + begun

    def _collect_header(self, buffer: Buffer, pos: int, stop: int, pieces: list[bytes | memoryview]) -> int:
        taken = min(HEADER_SIZE - len(self._header), stop - pos)
        self._header += buffer[pos : pos + taken]
        if len(self._header) == HEADER_SIZE:
            header, self._header = self._header, b""
            seq, length = FRAME_HEADER.unpack(header)
            if self._allowed(seq, length):
                self._missing = length - HEADER_SIZE
                if not self._missing:
                    pieces.append(header)
                    self.frames += 1
                    self.at_eof = True
        return pos + taken

    def _frame_anew(
        self, buffer: Buffer, view: memoryview, start: int, stop: int, pieces: list[bytes | memoryview]
    ) -> int:
        """Put payload into new frames: the rest of a frame that has begun, and long frames that follow it.

        The end of one long frame's payload moves up to the payload of the next, over the header between them,
        so that a new header can be written in place before it. A frame of 8 KiB then makes two pieces, not
        six, at the price of copying some hundred bytes. Returns where it stopped.
        """
        begin = pos = start
        end, joined, full_header = start + self._missing, 0, self._full_header
        while stop - end >= MAX_TO_AGENT:
            seq, length = _unpack_from(buffer, end)
            if seq != self._io_base or length <= MAX_TO_AGENT:
                break
            left = end - (end - pos) % _ROOM
            while pos < left:
                pieces += (view[begin:pos], full_header)
                begin = pos
                pos += _ROOM
            self.joints.append((left, end))
            pos = left + MAX_TO_AGENT
            end += length
            joined += 1
            if pos - begin > MOST_IN_SLICE - MAX_TO_AGENT:
                pieces.append(view[begin:pos])
                begin = pos
        self._missing, end = max(0, end - stop), min(end, stop)
        while pos < end:
            size = min(_ROOM, end - pos)
            pieces += (view[begin:pos], _pack(self._io_base, HEADER_SIZE + size))
            begin = pos
            pos += size
        pieces.append(view[begin:end])
        payload_bytes = end - start - joined * HEADER_SIZE
        self.payload_bytes += payload_bytes
        self.frames += -(-payload_bytes // _ROOM)
        self.at_eof = False
        return end

    def _allowed(self, seq: int, length: int) -> bool:
        if seq != self._io_base:
            self.error = f"a frame on stream {seq}, which is not this client's"
        elif length < HEADER_SIZE:
            self.error = f"a frame with a total length of {length}"
        return self.error is None


def _in_slices(row: memoryview, length: int) -> Iterator[memoryview]:
    """Return a row of frames of this length as slices of at most `MOST_IN_SLICE` bytes."""
    step = MOST_IN_SLICE // length * length
    return (row[at : at + step] for at in range(0, len(row), step))
