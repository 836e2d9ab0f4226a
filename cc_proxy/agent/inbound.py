"""Taking in what the host sends, with the real agent's limits and their consequences. No I/O."""

import struct

from cc_proxy.agent.errors import Panic
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.frames import FRAME_HEADER, Frame, FrameParser
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import HEADER, MAX_COMMAND, ControlMessage, encode
from cc_proxy.hyperstart.frames import MAX_TO_AGENT

#: Bytes of stdin that the real agent keeps for a process.
STDIN_SIZE = 512

_PIPE_SIZE = 64 * 1024

_SIZE = struct.Struct(">I")


def next_message(size: int) -> bytes:
    """Return the NEXT that acknowledges one read of `size` bytes on the control channel."""
    return encode(Code.NEXT, _SIZE.pack(size))


class ControlReceiver:
    """Assembles the host's commands the way the real agent reads them: the header first, then the body.

    The caller must not read more than `wanted` bytes at once: a NEXT with its size acknowledges each read.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        #: The most bytes that the next read may bring; never 0.
        self.wanted = HEADER.size

    def receive_data(self, data: bytes) -> ControlMessage | None:
        """Take the bytes of one read; returns the message if they complete it.

        Raises `Panic` for a message that does not fit the agent's buffer.
        """
        self._buffer += data
        self.wanted -= len(data)
        if not self.wanted and len(self._buffer) == HEADER.size:
            self.wanted = self._body_length()
        return None if self.wanted else self._take_message()

    def _body_length(self) -> int:
        _, length = HEADER.unpack(self._buffer)
        if length > MAX_COMMAND:
            raise Panic(f"a command of {length} bytes on the control channel")
        # Some hosts give a length of 0 or 4 if there is no body.
        return int(max(0, length - HEADER.size))

    def _take_message(self) -> ControlMessage:
        code, _ = HEADER.unpack_from(self._buffer)
        payload = bytes(self._buffer[HEADER.size :])
        self._buffer.clear()
        self.wanted = HEADER.size
        return ControlMessage(code, payload)


class HostFrames(FrameParser):
    """Splits what the host sends on the I/O channel into frames, up to the first over `longest` bytes."""

    def __init__(self, longest: int = MAX_TO_AGENT) -> None:
        super().__init__()
        self.longest = longest
        #: What ends the agent once it has handled the frames before.
        self.fatal: Panic | None = None

    @property
    def missing(self) -> int:
        """Bytes still to come of the next header or, once that has come, of its frame; never 0."""
        size = len(self._buffer)
        if size < FRAME_HEADER.size:
            return FRAME_HEADER.size - size
        _, length = FRAME_HEADER.unpack(self._buffer[: FRAME_HEADER.size])
        return int(length) - size

    def receive_data(self, data: bytes) -> list[Frame]:
        """Take bytes as they arrive, and return the frames they complete; sets `fatal` if one is too long.

        The header alone shows that: the agent does not wait for the rest.
        """
        try:
            frames = super().receive_data(data)
        except ProtocolError as error:
            self.fatal = Panic(f"{error} on the I/O channel")
            return []
        for index, frame in enumerate(frames):
            if not self._fits(frame.seq, FRAME_HEADER.size + len(frame.payload)):
                return frames[:index]
        if len(self._buffer) >= FRAME_HEADER.size:
            self._fits(*FRAME_HEADER.unpack_from(self._buffer))
        return frames

    def _fits(self, seq: int, length: int) -> bool:
        if length > self.longest:
            self.fatal = Panic(f"a frame of {length} bytes on stream {seq} of the I/O channel")
        return self.fatal is None


class StdinBuffer:
    """Stdin that one process has yet to take: up to `size` bytes, and whether end of file follows them."""

    def __init__(self, size: int = STDIN_SIZE) -> None:
        self._size = size
        self._bytes = bytearray()
        self._ended = False
        #: Bytes that did not fit, or came after end of file.
        self.dropped = 0

    @property
    def is_over(self) -> bool:
        """Whether end of file has come, and everything before it has been written."""
        return self._ended and not self._bytes

    def __len__(self) -> int:
        return len(self._bytes)

    def put(self, data: bytes) -> None:
        """Keep as much of `data` as fits; the rest is silently dropped."""
        room = 0 if self._ended else self._size - len(self._bytes)
        self._bytes += data[:room]
        self.dropped += max(0, len(data) - room)

    def end(self) -> None:
        """Take end of file."""
        self._ended = True

    def peek(self) -> bytes:
        """Return the beginning of what waits: as much as a pipe may take."""
        return bytes(self._bytes[:_PIPE_SIZE])

    def consume(self, size: int) -> None:
        """Remove `size` bytes from the front: they have been written."""
        del self._bytes[:size]
