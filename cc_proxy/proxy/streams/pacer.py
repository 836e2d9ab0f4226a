"""Which clients may be read: those whose process has room for stdin, as far as the agent tells.

There are two ways to learn that the agent has handled its stdin (docs/protocol.md, 4). A marker sent after it
comes back. That is cheap, but an agent whose output buffer is full drops markers. So if one does not come
back in time, the agent is sent pings on the control channel, once the VM has taken everything from the I/O
socket. In each round of its loop the agent takes one command and one frame. So one more ping than there may
be frames waiting proves that all of them are handled.

A lossless agent never drops a marker, and sends it back when the process has taken its stdin. It is asked
once, and waited for.
"""

import functools
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping

from cc_proxy.continuity import cells
from cc_proxy.continuity.cells import Cell
from cc_proxy.continuity.state.streams import PacerState
from cc_proxy.hyperstart.pacing import (
    FIRST_MARKER,
    LOSSLESS,
    LOSSLESS_WINDOW,
    MARKERS_TO_TRUST,
    MOST_QUEUED,
    StdinWindow,
    marked_stream,
)
from cc_proxy.linux.fds import untaken
from cc_proxy.proxy.streams.interfaces import Acknowledge
from cc_proxy.proxy.streams.session import Session

#: Seconds between the first and second look whether the VM has taken everything, which no event announces.
#: Each later look waits twice as long.
_LOOK_AGAIN = 0.001


class Pacer:
    """The sessions whose stdin waits for the agent. Only the thread that drives the channel calls it."""

    def __init__(
        self,
        io: socket.socket,
        owners: Mapping[int, Session],
        echo_timeout: float,
        acknowledge: Acknowledge,
        cell: Cell,
        on_room: Callable[[Session], None],
    ) -> None:
        """`echo_timeout` and `acknowledge` are those of `Pacing`.

        `on_room` is called with each session that may be read again.
        """
        self._io = io
        self._owners = owners
        self._echo_timeout = echo_timeout
        self._acknowledge = acknowledge
        #: Sessions whose marker is on its way, the one that is due next first. For each: when to ask again,
        #: and the marker's number among `frames`.
        self.asked: dict[Session, tuple[float, int]] = {}
        # The sessions that the pings on their way cover. Stdin sent after those pings needs another round.
        self._round: set[Session] | None = None
        self._look_at = math.inf  # when to look whether the VM has taken everything, for a round
        self._look_again = _LOOK_AGAIN
        self._handled = 0  # how many of `frames` the agent is known to have handled
        self._echoes_in_a_row = MARKERS_TO_TRUST
        #: Frames sent to the agent, after long ones were split; and how many of them were markers.
        self.frames = self.markers = 0
        self._cell = cell
        self._is_lossless = False
        self._on_room = on_room

    def room(self, window: StdinWindow) -> int:
        """Return how many bytes of payload may be sent now to the stream that has this window."""
        if self._is_lossless:
            window.widen(LOSSLESS_WINDOW)
        return window.room

    def restore(self, state: PacerState, sessions: Iterable[Session]) -> None:
        """Go on where another process stood. Its markers may still come back, or are sent again.

        Pings that were on their way prove nothing any more.
        """
        self.frames, self.markers, self._handled = state.frames, state.markers, state.handled
        self._echoes_in_a_row = state.echoes_in_a_row
        if state.lossless:
            self._be_lossless()
        ask_at = time.monotonic() + self._echo_timeout
        self.asked = {session: (ask_at, 0) for session in sessions if session.window and session.window.asked}

    def state(self) -> PacerState:
        """Return what `restore` needs."""
        return PacerState(self.frames, self.markers, self._handled, self._echoes_in_a_row, self._is_lossless)

    def sent(self, session: Session, payload_bytes: int) -> bytes | None:
        """Count what was sent; returns a marker if one has to be sent after it.

        If so, the session must not be read until `on_room` is called with it.
        """
        marker = session.window.sent(payload_bytes) if session.window else None
        if marker:
            session.note_marker()
            now = time.monotonic()
            self._count_marker()
            self.asked[session] = now + self._echo_timeout, self.frames
            if self._echoes_in_a_row < MARKERS_TO_TRUST:
                self._prepare_round(now)
        return marker

    def _count_marker(self) -> None:
        self.frames += 1
        self.markers += 1

    def forget(self, session: Session) -> None:
        """Stop waiting for the agent on behalf of a session: it has room again, or is about to be closed."""
        self.asked.pop(session, None)
        if self._round:
            self._round.discard(session)
        if not self.asked:
            self._look_at = math.inf

    def echo(self, seq: int, size: int) -> bool:
        """A frame came that nobody owns, with `size` bytes of payload; returns whether it may be a marker."""
        if seq < FIRST_MARKER:
            return False
        session = self._owners.get(marked_stream(seq))
        if seq == FIRST_MARKER and size == len(LOSSLESS):
            self._be_lossless()
        elif session and session.window and session.window.echoed(seq):
            if size == len(LOSSLESS):
                self._be_lossless()
            self._echoes_in_a_row += 1
            # Frames are handled in their order. A copy of the marker may have been later than this one.
            self._handled = max(self._handled, self.asked[session][1])
            self._let_go_on(session)
        return True

    @property
    def _ask_at(self) -> float:
        """When the next marker is to be sent again."""
        if not self.asked or self._is_lossless:
            return math.inf
        return next(iter(self.asked.values()))[0]

    def moment(self) -> float:
        """Return when `run_timers` has something to do."""
        return min(self._ask_at, self._look_at)

    def put_off(self, now: float) -> None:
        """Wait anew for all markers: none could have come back."""
        ask_at = now + self._echo_timeout
        self.asked = {session: (ask_at, number) for session, (_, number) in self.asked.items()}

    def run_timers(self, now: float) -> list[bytes]:
        """Return markers to send again because they did not come back in time.

        There are none while the VM stands still: it would get all of them at once when it goes on.
        """
        markers = []
        if now >= self._ask_at:
            self._prepare_round(now)
            if untaken(self._io):
                self.put_off(now)
        while now >= self._ask_at:
            session = next(iter(self.asked))
            _, number = self.asked.pop(session)
            self.asked[session] = now + self._echo_timeout, number
            if session.window:
                markers.append(session.window.ask_again())
                self._count_marker()
        # Not while markers are yet to be sent: the VM has to take those as well before it is asked.
        if not markers and now >= self._look_at:
            self._look(now)
        return markers

    # The control channel ----------------------------------------------------------------------------------

    def _prepare_round(self, now: float) -> None:
        if self._round is None and self._look_at == math.inf and not self._is_lossless:
            self._look_at, self._look_again = now, _LOOK_AGAIN

    def _look(self, now: float) -> None:
        """Send the pings if the VM has taken everything that they are to cover."""
        if untaken(self._io):
            self._look_at = now + self._look_again
            self._look_again = min(2 * self._look_again, max(self._echo_timeout, _LOOK_AGAIN))
            return
        self._look_at = math.inf
        if self.asked:
            self._round = set(self.asked)
            sent = self.frames
            self._acknowledge(
                min(sent - self._handled, MOST_QUEUED) + 1,
                functools.partial(self._end_round, self._round, sent),
            )

    def _end_round(self, covered: set[Session], sent: int, answered: bool) -> None:
        """The pings that cover the first `sent` frames were answered, or will not be."""
        if self._round is not covered:
            return
        self._round = None
        if not answered:
            return  # that proves nothing: too many commands may be waiting for their answers
        self._handled = max(self._handled, sent)
        if covered:
            self._echoes_in_a_row = 0
        for session in covered:
            if session.window:
                session.window.reset()
            self._let_go_on(session)
        if self.asked:
            self._prepare_round(time.monotonic())

    def _let_go_on(self, session: Session) -> None:
        if session in self.asked:
            self.forget(session)
            self._on_room(session)

    def _be_lossless(self) -> None:
        if not self._is_lossless:
            self._cell[cells.LOSSLESS] = self._is_lossless = True
            self._round, self._look_at = None, math.inf
