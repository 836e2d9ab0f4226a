"""A process's streams as frames (docs/protocol.md, 3), and how they tell that it has ended. No I/O."""

from enum import Enum

from cc_proxy.api import Frame, FrameParser, encode_frame
from cc_proxy.api.frames import FRAME_HEADER

#: Longest frame of stdin, header included; clients in the field send this much.
MAX_STDIN_FRAME = 8192
MAX_STDIN_PAYLOAD = MAX_STDIN_FRAME - FRAME_HEADER.size

STDOUT_FD = 1
STDERR_FD = 2


class _Phase(Enum):
    RUNNING = "output is awaited"
    AT_EOF = "output has ended, the exit status is next"
    ENDED = "the exit status is known"


class ExitWatch:
    """Follows the frames of one process's stdio stream until they tell its exit status.

    When the process ends, an empty frame comes, and the next frame of one byte is the exit status. Any other
    frame before the exit status is output.
    """

    def __init__(self) -> None:
        self._phase = _Phase.RUNNING
        #: The exit status, None until it is known.
        self.status: int | None = None

    def output(self, payload: bytes) -> bytes:
        """Take the payload of the next frame; returns it if it is output, else nothing."""
        if self._phase is _Phase.RUNNING and not payload:
            self._phase = _Phase.AT_EOF
        elif self._phase is _Phase.AT_EOF and len(payload) == 1:
            self._phase = _Phase.ENDED
            self.status = payload[0]
            return b""
        return b"" if self._phase is _Phase.ENDED else payload


class ProcessStreams:
    """Sorts what arrives on a process's I/O fd into stdout and stderr."""

    def __init__(self, io_base: int) -> None:
        self._io_base = io_base
        self._parser = FrameParser()
        self._watch = ExitWatch()

    @property
    def status(self) -> int | None:
        """The process's exit status, None until it is known."""
        return self._watch.status

    def receive_data(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take the next bytes; returns pairs of a standard fd and output for it, in order.

        Neighbouring frames for the same fd are joined. Raises `ProtocolError` if the bytes are not frames.
        """
        runs: list[tuple[int, list[bytes]]] = []
        for frame in self._parser.receive_data(data):
            fd, output = self._sort(frame)
            if not output:
                continue
            if not runs or runs[-1][0] != fd:
                runs.append((fd, []))
            runs[-1][1].append(output)
        return [(fd, b"".join(pieces)) for fd, pieces in runs]

    def _sort(self, frame: Frame) -> tuple[int, bytes]:
        if frame.seq == self._io_base:
            return STDOUT_FD, self._watch.output(frame.payload)
        return STDERR_FD, frame.payload


def stdin_frames(seq: int, data: bytes) -> bytes:
    """Return `data` as frames of stream `seq`; empty data as an end-of-file frame."""
    view = memoryview(data)
    starts = range(0, max(1, len(data)), MAX_STDIN_PAYLOAD)
    return b"".join(encode_frame(seq, view[start : start + MAX_STDIN_PAYLOAD]) for start in starts)
