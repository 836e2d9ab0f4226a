"""The I/O channel as the agent serves it: frames to the processes' stdin, and frames of their output."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cc_proxy.agent.inbound import HostFrames
from cc_proxy.agent.ports import Port
from cc_proxy.agent.process import ProcessStdin
from cc_proxy.agent.processes import Processes
from cc_proxy.agent.quirks import Quirks
from cc_proxy.api.frames import FRAME_HEADER, MAX_FRAME, Frame, encode_frame
from cc_proxy.hyperstart.frames import MAX_FROM_AGENT, MAX_TO_AGENT
from cc_proxy.hyperstart.pacing import FIRST_MARKER, LOSSLESS, marked_stream

_READ_SIZE = 64 * 1024
_END_SIZE = 2 * FRAME_HEADER.size + 1
#: Bytes of answers that may wait for a host that does not read, besides output.
_MOST_ANSWERS = 64 * 1024


class IoChannel:
    """One write buffer of 10,240 bytes for the output of all processes, and a route for the host's frames.

    The real agent takes one frame a round. It answers a frame that no process owns at once, or never if its
    buffer is full. With `lossless`, all frames that have come are taken at once, and no answer is left out. A
    marker (docs/protocol.md, 4) comes back when its process has taken its stdin. Nothing more is read while
    more waits for any process than a host may send it at once.
    """

    def __init__(self, port: Port, processes: Processes, quirks: Quirks, *, lossless: bool) -> None:
        self.lossless = lossless
        self._port = port
        self._processes = processes
        self._frames = HostFrames(MAX_FRAME if lossless else MAX_TO_AGENT)
        self._full: set[ProcessStdin] = set()
        self._answers_to_drop = sys.maxsize if quirks.no_echo else quirks.drop_echoes

    def announce(self) -> None:
        """Tell the host that the agent is lossless, if it is and there is room for that.

        Without room this is left out: each marker that comes back tells the host, too.
        """
        if self.lossless and self.room >= len(LOSSLESS):
            self.send(FIRST_MARKER, LOSSLESS)

    # What processes call -----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Bytes of payload that a frame may have now; 0 or less if there is no room for one."""
        return self._free - FRAME_HEADER.size

    @property
    def is_awaited(self) -> bool:
        """Whether anything waits for room."""
        return self._port.is_awaited

    def send(self, seq: int, payload: bytes) -> None:
        """Send a frame for which there is room."""
        self._send(encode_frame(seq, payload))

    def send_end(self, seq: int, status: int) -> bool:
        """Send end of file and the exit status of a process; False if there is no room."""
        if self._free < _END_SIZE:
            return False
        self._send(encode_frame(seq) + encode_frame(seq, bytes([status])))
        return True

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once, when the write buffer is empty."""
        self._port.when_drained(callback)

    def flush(self) -> None:
        """Send the host what waits for it now."""
        self._port.flush()

    def set_full(self, stdin: ProcessStdin, full: bool) -> None:
        """Note whether more waits for a process than a host may send it at once."""
        (self._full.add if full else self._full.discard)(stdin)
        self._set_reading()

    @property
    def _free(self) -> int:
        return MAX_FROM_AGENT - self._port.waiting_size

    def _send(self, message: bytes) -> None:
        if self.lossless:
            self._port.send(message)
        else:
            self._port.send_later(message)

    # What the port calls -----------------------------------------------------------------------------

    def connected(self) -> None:
        """Drop what the last host did not finish. Output that waited goes out by itself."""
        self._frames = HostFrames(self._frames.longest)
        self.announce()

    def disconnected(self) -> None:
        """Keep what waits for the next host."""

    def readable(self) -> None:
        """Take what the host has sent. Raises `Panic` for a frame that is too long."""
        frames: list[Frame] = []
        while not frames and self._frames.fatal is None:
            data = self._port.receive(_READ_SIZE if self.lossless else self._frames.missing)
            if not data:
                return
            frames = self._frames.receive_data(data)
        for frame in frames:
            self._take(frame)
        if self._frames.fatal is not None:
            raise self._frames.fatal

    def _take(self, frame: Frame) -> None:
        process = self._processes.owner(frame.seq)
        if process is not None:
            process.stdin.take(frame.payload)
        elif self._answers_to_drop:
            self._answers_to_drop -= 1
        else:
            self._answer_stray(frame.seq)

    def _answer_stray(self, seq: int) -> None:
        process = self._processes.owner(marked_stream(seq)) if seq >= FIRST_MARKER else None
        if process is not None and process.stdin.is_stuck:
            process.stdin.when_taken(seq, lambda: self._answer(seq))
        else:
            self._answer(seq)

    def _answer(self, seq: int) -> None:
        if self.lossless or self.room >= 0:
            self.send(seq, LOSSLESS if self.lossless and seq >= FIRST_MARKER else b"")
        if self._has_most_answers:
            self._set_reading()
            self._port.when_drained(self._set_reading)

    def _set_reading(self) -> None:
        self._port.set_reading(not self._full and not self._has_most_answers)

    @property
    def _has_most_answers(self) -> bool:
        return self._port.waiting_size > MAX_FROM_AGENT + _MOST_ANSWERS
