"""Output: frames from one VM to its clients. The thread that drives the channel does everything here."""

import math
from collections.abc import Callable, Iterator, Sequence

from cc_proxy.api.frames import FRAME_HEADER
from cc_proxy.continuity.state.streams import StreamsState
from cc_proxy.hyperstart.frames import HEADER_SIZE, Batch, Buffer, gather
from cc_proxy.hyperstart.resync import Resync, Unrecognisable
from cc_proxy.linux.selector import WRITE, Selector
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.dump import dump_frames
from cc_proxy.proxy.streams.intake import Intake
from cc_proxy.proxy.streams.routes import Routes
from cc_proxy.proxy.streams.session import Session


class FramingLost(Exception):
    """What the VM sent is no frame; the text says what is wrong with it."""


class Output:
    """Reads the I/O channel and passes frames to the sessions that own them.

    `before_delivery` is called after each read, as the last chance to add the sessions that own the frames.
    `on_stray` is called with the seq and the payload's size of each frame that nobody owns, and returns
    whether it knows the frame.
    """

    def __init__(
        self,
        vm: str,
        intake: Intake,
        selector: Selector,
        routes: Routes,
        before_delivery: Callable[[], None],
        on_stray: Callable[[int, int], bool],
    ) -> None:
        self._vm = vm
        self._intake = intake
        self._selector = selector
        self._routes = routes
        self._before_delivery = before_delivery
        self._on_stray = on_stray
        #: Looks for the beginning of a frame, while none is known.
        self.resync: Resync | None = None
        #: Sessions whose clients have output waiting, by fd. They are watched.
        self.waiting: dict[int, Session] = {}
        #: Those of them that still need the buffer. While there are any, the VM cannot be read.
        self.holding: set[Session] = set()
        self._stuck: set[Session] = set()  # those of them that the log has named already
        #: Bytes and whole frames for clients, including what still waits for them.
        self.bytes = self.frames = 0
        #: Frames that nobody owned.
        self.strays = 0
        #: How often the VM had to wait because the spool did not take what a client did not read.
        self.pauses = 0

    @property
    def unfinished(self) -> bytes:
        """What has been read of a frame that has not arrived whole."""
        return b"" if self.resync else self._intake.unfinished

    def restore(self, state: StreamsState, sessions: Sequence[Session]) -> None:
        """Go on where another process stood, with what waited for clients there."""
        before = state.traffic
        self.bytes, self.frames = before.bytes_to_clients, before.frames_to_clients
        self.strays, self.pauses = before.stray_frames, before.pauses
        self.resync = Resync(state.resync) if state.resync else None
        self._intake.restore(state.unfinished, seeking=state.resync is not None)
        for session in sessions:
            if session.stuck:
                self._stuck.add(session)
            self._settle(session)

    def read(self) -> int:
        """Read once and deliver what came; returns how many bytes that was, 0 at end of file.

        Not while sessions are `holding` the buffer. Raises `BlockingIOError`, `FramingLost` (what came before
        is delivered), or another `OSError`.
        """
        intake = self._intake
        size = intake.read()
        if size:
            if self.resync and not self._find_frames(self.resync):
                return size
            self._before_delivery()
            for batch in self._batches(intake.buffer, intake.view, intake.start, intake.stop):
                intake.start = batch.stop  # first, so that nothing is delivered twice after an error
                self._deliver(batch)
                if batch.error:
                    raise FramingLost(batch.error)
            if not self.holding:
                intake.passed_on()
        return size

    def _find_frames(self, resync: Resync) -> bool:
        """Discard what was read before the first frame; returns whether a frame has been found."""
        try:
            found = resync.receive(self._intake.unfinished)
        except Unrecognisable:
            raise FramingLost("nothing that it sends looks like a frame") from None
        self._intake.restore(found or b"", seeking=found is None)
        if found is not None:
            logger.info("framing is regained", extra={"vm": self._vm})
            self.resync = None
        return found is not None

    def read_rest(self) -> None:
        """Read what has arrived by now, for the last time. It goes into a buffer of its own: sessions may be
        `holding` the other.

        Raises `OSError`.
        """
        rest = self._intake.read_rest()
        if self.resync:
            return  # without frames, nobody can tell which client it is for
        self._before_delivery()
        for batch in self._batches(rest, memoryview(rest), 0, len(rest)):
            self._deliver(batch)

    def _batches(self, buffer: Buffer, view: memoryview, start: int, stop: int) -> Iterator[Batch[Session]]:
        """Find the whole frames there, nearly always as one batch. Deliver each before taking the next."""
        owners = self._routes.owners
        batch = gather(buffer, view, start, stop, owners)
        first_words = self._first_words(batch, buffer, start)
        for seq, pos in first_words:
            yield self._count(gather(buffer, view, start, pos, owners), view[start:pos])
            self._routes.start(seq)
            start = pos
        if first_words:
            batch = gather(buffer, view, start, stop, owners)
        yield self._count(batch, view[start : batch.stop])

    def _count(self, batch: Batch[Session], frames: memoryview) -> Batch[Session]:
        """Count and log a batch, which consists of `frames`; returns it."""
        self.bytes += len(frames) - sum(length for _, length in batch.strays)
        self.frames += batch.frames - len(batch.strays)
        if logger.isEnabledFor(IO):
            dump_frames(self._vm, "output", (frames,))
        return batch

    def _first_words(self, batch: Batch[Session], buffer: Buffer, start: int) -> list[tuple[int, int]]:
        """Return the seqs whose first output shows that a process has started, and where each begins.

        An empty frame is no output.
        """
        silent = self._routes.silent
        said = {seq for seq, length in batch.strays if length > HEADER_SIZE and seq in silent}
        found = []
        while said:
            seq, length = FRAME_HEADER.unpack_from(buffer, start)
            if seq in said and length > HEADER_SIZE:
                said.remove(seq)
                found.append((seq, start))
            start += length
        return found

    def _deliver(self, batch: Batch[Session]) -> None:
        self._deliver_each(iter(batch.slices.items()))
        for seq, length in batch.strays:
            self.strays += not self._on_stray(seq, length - HEADER_SIZE)

    def _deliver_each(self, slices: Iterator[tuple[Session, list[memoryview]]]) -> None:
        for session, pieces in slices:
            try:
                if session.deliver(pieces):
                    self._settle(session)
            except Exception:
                # Later output would follow a gap, so this session gets no more. The others miss nothing.
                session.give_up_output()
                self._deliver_each(slices)
                raise

    def flush(self, session: Session) -> None:
        """Handle a client that takes output again, or has gone."""
        session.flush()
        self._settle(session)

    def forget(self, session: Session) -> None:
        """Stop watching a session: nothing waits for its client any more, or it is about to be closed."""
        if self.waiting.pop(session.fd, None):
            self._selector.remove(session.fd)
        self._release(session)
        self._stuck.discard(session)

    def moment(self) -> float:
        """Return when `run_timers` has something to do."""
        return min((session.patient_until for session in self.holding), default=math.inf)

    def look(self) -> None:
        """Look for what no event announces (`Session.look`). To be called now and then."""
        for session in list(self.waiting.values()):
            session.look()
            self._settle(session)

    def run_timers(self, now: float) -> None:
        """Spool output for clients that have had their time to catch up."""
        for session in list(self.holding):
            if now >= session.patient_until:
                session.spill()
                self._settle(session)

    def _settle(self, session: Session) -> None:
        """Watch the session's client for as long as something waits for it."""
        if session.waits and session.fd not in self.waiting:
            try:
                self._selector.add(session.fd, WRITE)
                self.waiting[session.fd] = session
            except OSError as error:
                session.fail(error)
        if not session.waits:
            self.forget(session)
        elif session.pending:
            self._hold(session)
        else:
            self._release(session)

    def _hold(self, session: Session) -> None:
        """Keep the buffer, which the session still needs."""
        self.holding.add(session)
        if session.stuck and session not in self._stuck:
            self._stuck.add(session)
            self.pauses += 1
            fields = session.log_fields(reason=session.stuck)
            logger.warning("the VM is not read until its client reads", extra=fields)

    def _release(self, session: Session) -> None:
        """The session no longer needs the buffer."""
        if session in self.holding:
            self.holding.remove(session)
            if not self.holding:
                self._intake.passed_on()
