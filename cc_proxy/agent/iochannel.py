"""The I/O channel as the agent serves it: frames to the processes' stdin, frames of what they put out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from cc_proxy.agent.echoes import Echoes
from cc_proxy.agent.inbound import HostFrames
from cc_proxy.agent.loop import Loop
from cc_proxy.agent.ports import Port
from cc_proxy.agent.process import Process, Stdin
from cc_proxy.agent.quirks import Quirks
from cc_proxy.api.frames import FRAME_HEADER, Frame, encode_frame
from cc_proxy.hyperstart.frames import MAX_FROM_AGENT

_READ_SIZE = 64 * 1024
_END_SIZE = 2 * FRAME_HEADER.size + 1


class IoChannel:
    """One write buffer of 10,240 bytes for all processes, and where the host's frames go.

    `processes` are those that own a stdio seq; whoever starts and ends them keeps it up to date.
    """

    def __init__(self, loop: Loop, port: Port, processes: Mapping[int, Process], quirks: Quirks) -> None:
        self._port = port
        self._processes = processes
        self._frames = HostFrames()
        self._echoes = Echoes(loop, self._echo, drop=sys.maxsize if quirks.no_echo else quirks.drop_echoes)

    # What processes call -----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Bytes of payload that a frame may have now; 0 or less if there is no room for one."""
        return self._free - FRAME_HEADER.size

    def send(self, seq: int, payload: bytes) -> None:
        """Send a frame for which there is room."""
        self._port.send(encode_frame(seq, payload))

    def send_end(self, seq: int, status: int) -> bool:
        """Send what says that a process has ended; False if there is no room."""
        if self._free < _END_SIZE:
            return False
        self._port.send(encode_frame(seq) + encode_frame(seq, bytes([status])))
        return True

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once, when all the room there can be is there."""
        self._port.when_drained(callback)

    def stdin_stuck(self, stdin: Stdin, stuck: bool) -> None:
        """Have a host that waits for it to be free wait a little longer, if it is stuck."""
        if stuck:
            self._echoes.wait_for(stdin)
        else:
            self._echoes.go_on(stdin)

    @property
    def _free(self) -> int:
        return MAX_FROM_AGENT - self._port.waiting_size

    # What the port calls -----------------------------------------------------------------------------

    def connected(self) -> None:
        """Nothing is due: what waited goes out by itself."""

    def disconnected(self) -> None:
        """What waits is for the next host."""

    def readable(self) -> None:
        """Take what the host has sent. Raises `Panic` for a frame that is too long."""
        data = self._port.receive(_READ_SIZE)
        if not data:
            return
        self._handle(self._frames.receive_data(data))
        if self._frames.fatal is not None:
            raise self._frames.fatal

    def _handle(self, frames: list[Frame]) -> None:
        """Handle frames in the turns of the real agent.

        It takes one frame a turn, and what a frame brought is written to its process at the end of the next
        one. So of ten frames of 400 bytes that come at once, two share the 512 bytes each time.
        """
        fed: Stdin | None = None
        for frame in frames:
            process = self._processes.get(frame.seq)
            if process is not None:
                process.stdin.take(frame.payload)
            if fed is not None:
                fed.drain()
            if process is None:
                self._echoes.answer(frame.seq)
            fed = process.stdin if process is not None and process.stdin is not fed else None
        if fed is not None:
            fed.drain()

    def _echo(self, seq: int) -> None:
        """Say that a seq is nobody's, unless there is no room to say it."""
        if self.room >= 0:
            self.send(seq, b"")
