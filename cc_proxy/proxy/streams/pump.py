"""One VM's I/O pump: the thread that copies frames between the I/O channel and the clients' fds.

`Channel` is what the thread works on; here is the thread itself, and what other threads may ask of it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

from cc_proxy.api.status import Streams
from cc_proxy.continuity.memory import Memory
from cc_proxy.continuity.state.streams import ChannelState
from cc_proxy.linux.threads import start_thread
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.streams.channel import Channel
from cc_proxy.proxy.streams.interfaces import Owner, Pacing, Sockets
from cc_proxy.proxy.streams.mailbox import Mailbox
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.spool import is_at_disk


class Pump:
    """A thread that works on one VM's channel, and ends when all is delivered.

    Any thread may call its methods. They leave a call for the thread, and none but `join` waits.
    """

    def __init__(
        self,
        owner: Owner,
        sockets: Sockets,
        memory: Memory,
        one_at_a_time: Callable[[bool], AbstractContextManager[None]],
        pacing: Pacing,
    ) -> None:
        """Take over the VM's sockets and its memory; see `Channel`.

        `one_at_a_time` is entered for the work of each turn, never while the thread waits, so that the pumps
        of one user can take turns. Its argument says whether the batch is likely to be large. Raises
        `OSError`; the caller keeps everything then.
        """
        self._owner = owner
        self._one_at_a_time = one_at_a_time
        self._mailbox = Mailbox()
        try:
            self._channel = Channel(owner, sockets, memory, self._mailbox, pacing)
        except BaseException:
            self._mailbox.close()
            raise
        self._resting = False  # set by the pump's thread
        self._probed = False  # set by the watchdog's thread, taken back by the pump's
        name = f"pump {owner.container_id[:32]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # Any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to copy. Raises `RuntimeError` if no thread can be started; everything is closed then."""
        try:
            start_thread(self._thread)
        except BaseException:
            self._close()
            raise

    def add(self, session: Session) -> bool:
        """Take over a session: frames for its seqs reach it from now on. False if the pump has ended."""
        return self._mailbox.post(lambda: self._channel.add(session))

    def expect_processes(self, seqs: Iterable[int]) -> None:
        """A command is about to be sent that starts processes with these seqs as stdio.

        Call this before it is sent: only from then on does an empty frame on one of them mean end of file.
        No session need own them.
        """
        self._mailbox.post(lambda: self._channel.expect_processes(seqs))

    def open_stdin(self, seqs: Iterable[int]) -> None:
        """That command was acknowledged: read what clients send to these processes from now on.

        Output on a stdio has the same effect.
        """
        self._mailbox.post(lambda: self._channel.open_stdin(seqs))

    def describe(self) -> Future[Streams]:
        """Ask what `status` says of the streams, all of it at one moment.

        The thread answers after its current turn, so wait with a deadline. The answer is cancelled if the
        pump has ended.
        """
        answer: Future[Streams] = Future()
        if not self._mailbox.post(lambda: self._answer(answer)):
            answer.cancel()
        return answer

    def finish(self, cause: str, after: float = 0.0) -> None:
        """In `after` seconds at the latest, close both channels, deliver what came by then, and end."""
        at = time.monotonic() + after
        self._mailbox.post(lambda: self._channel.finish_by(at, cause))

    def abort(self) -> None:
        """End now. What waits is lost."""
        self._mailbox.post(self._channel.abort)

    def rest(self) -> None:
        """End the thread after its current turn, and close nothing. `join` and `hand_over` come next."""

        def leave() -> None:
            self._resting = True

        self._mailbox.post(leave)

    def hand_over(self) -> ChannelState | None:
        """Return what another pump goes on with (`restore`); None if nothing was left to do.

        Call it after `rest` and `join`, when no thread leaves calls any more.
        """
        if not self._resting or not self._channel.is_in_use:
            return None
        self._mailbox.make_calls()
        self._mailbox.close()
        return self._channel.hand_over()

    def restore(self, state: ChannelState, sessions: Sequence[Session]) -> None:
        """Go on where another pump of this VM stood (`Channel.restore`). Before `start`."""
        self._channel.restore(state, sessions)

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread's end; returns whether it has ended."""
        try:
            self._thread.join(timeout)
        except RuntimeError:  # it has not started yet
            return False
        return not self._thread.is_alive()

    @property
    def session_count(self) -> int:
        """How many sessions there are."""
        return self._channel.session_count

    def probe(self) -> bool:
        """Whether the thread has answered the last probe; if so, send another. One thread at a time.

        A pump that waits for the VM, or for clients, answers at once. One that has not begun, or has ended,
        need not answer. Nor need one that waits for the spool's disk, which no restart would mend.
        """
        if self._probed and self._thread.is_alive():
            hangs_in_disk = is_at_disk(self._thread.ident)
            if hangs_in_disk:
                logger.error("the spool's disk does not answer", extra={"vm": self._owner.container_id})
            return hangs_in_disk
        self._probed = True
        self._mailbox.post(self._answer_probe)
        return True

    # Pump thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._contain(self._copy)
        if self._resting and self._channel.is_in_use:
            return
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._owner.ended)
            last_first.callback(self._contain, self._close)
            # These two have something to do only after an error: they deliver what had arrived.
            last_first.callback(self._contain, self._copy)
            last_first.callback(self._contain, self._channel.finish_reading)

    def _contain(self, step: Callable[[], None]) -> None:
        """An unexpected error costs this VM, and nothing else."""
        try:
            step()
        except Exception:
            faults.note("I/O pump failed", vm=self._owner.container_id)
            self._owner.lose("internal error in its I/O pump")

    def _copy(self) -> None:
        channel = self._channel
        large = False
        while channel.is_in_use and not self._resting:
            ready = channel.wait()
            with self._one_at_a_time(large):
                # Only reading shows whether a batch is large, but streams are steady.
                large = channel.serve(ready)

    def _answer(self, answer: Future[Streams]) -> None:
        try:
            answer.set_result(self._channel.describe())
        except Exception as error:  # whatever it is, a question must not end the pump
            answer.set_exception(error)

    def _answer_probe(self) -> None:
        self._probed = False

    def _close(self) -> None:
        """Close everything, also sessions that are still in the mailbox, even if closing some of it fails."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._channel.close)
            last_first.callback(self._mailbox.make_calls)
            last_first.callback(self._channel.abort)
            last_first.callback(self._mailbox.close)
