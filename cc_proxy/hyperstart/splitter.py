"""Stdin of the I/O channel in batches (docs/protocol.md, 3 and 4). No I/O."""

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.hyperstart.frames import HEADER_SIZE, MAX_TO_AGENT, ROW, Buffer, alike
from cc_proxy.hyperstart.state import SplitterState

_ROOM = MAX_TO_AGENT - HEADER_SIZE

_pack = FRAME_HEADER.pack
_unpack_from = FRAME_HEADER.unpack_from


class StdinSplitter:
    """Turns what one client sends into frames that its agent can take, as few long slices of the buffer.

    Frames of up to `MAX_TO_AGENT` bytes that arrive in one piece pass unchanged. The payload of a longer
    frame, or of one that is still arriving, is passed on in new frames. So nothing is ever kept back but an
    unfinished header.
    """

    def __init__(self, io_base: int) -> None:
        self._io_base = io_base
        self._full_header = _pack(io_base, MAX_TO_AGENT)
        self._header = b""
        self._missing = 0
        #: Payload bytes handed out so far.
        self.payload_bytes = 0
        #: Frames handed out so far. A longer frame of the client's counts as the frames it was split into.
        self.frames = 0
        #: Whether the last frame handed out was end of file.
        self.at_eof = False
        #: What the client sent that it may not send; nothing is handed out after that.
        self.error: str | None = None

    def state(self) -> SplitterState:
        """Return where it stands, for `restore`."""
        return SplitterState(self._header, self._missing, self.payload_bytes, self.frames, self.at_eof)

    def restore(self, state: SplitterState) -> None:
        """Go on where another one of this stream stood."""
        self._header, self._missing = state.header, state.missing
        self.payload_bytes, self.frames, self.at_eof = state.payload_bytes, state.frames, state.at_eof

    def split(self, buffer: Buffer, view: memoryview, start: int, stop: int) -> list[bytes | memoryview]:
        """Turn `buffer[start:stop]` into pieces to be written to the agent one after the other.

        `view` is a memoryview of `buffer`. This method may change the bytes from `start` to `stop`. A frame
        on another seq than the client's own, or with a total length under 12, sets `error`; neither that
        frame nor anything after it is in the pieces. A piece may be empty.
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

    def _pass_only_frame(
        self, buffer: Buffer, view: memoryview, start: int, stop: int, pieces: list[bytes | memoryview]
    ) -> int:
        """Pass exactly one whole, short frame, as in interactive use."""
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
        """Pass frames that are whole and short enough; begin the payload of the first that is not."""
        pos, frames, last_length, begun = start, 0, -1, 0
        while stop - pos >= HEADER_SIZE:
            seq, length = _unpack_from(buffer, pos)
            if length == last_length and stop - pos >= ROW * length and seq == self._io_base:
                count = alike(buffer, pos, length, stop)
                pos += length * count
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
            pieces.append(view[start:pos])
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

        The end of one long frame's payload moves up to the payload of the next, over its header, so that a
        new header can be written in place before it. A frame of 8 KiB then makes two pieces, not six, at the
        price of copying some hundred bytes.
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
            view[left : end + HEADER_SIZE] = full_header + buffer[left:end]
            pos = left + MAX_TO_AGENT
            end += length
            joined += 1
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
