"""One process of a pod: its streams, its signals and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from cc_proxy.agent.errors import CommandRefused
from cc_proxy.agent.inbound import STDIN_SIZE, StdinBuffer
from cc_proxy.agent.loop import READ, WRITE, Loop, Turn
from cc_proxy.agent.spawn import Child, set_size
from cc_proxy.hyperstart.pacing import LOSSLESS_WINDOW

#: Seconds that the real agent takes to answer (measured), and that a process takes to load its program.
_ROUND_TRIP, _LOADING = 0.004, 0.1


class FrameChannel(Protocol):
    """What a process needs from the I/O channel."""

    #: Whether no stdin may be lost.
    lossless: bool

    @property
    def room(self) -> int:
        """Bytes of payload that a frame may have now; 0 or less if there is no room for one."""

    @property
    def is_awaited(self) -> bool:
        """Whether anything waits for room."""

    def send(self, seq: int, payload: bytes) -> None:
        """Send a frame for which there is room."""

    def send_end(self, seq: int, status: int) -> bool:
        """Send end of file and the exit status of a process; False if there is no room."""

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once, when the write buffer is empty."""

    def announce(self) -> None:
        """Tell the host that the agent is lossless, if it is."""

    def flush(self) -> None:
        """Send the host what waits for it now."""

    def set_full(self, stdin: ProcessStdin, full: bool) -> None:
        """Note whether more waits for a process than a host may send it at once."""


class ProcessStdin:
    """A process's stdin. What the process does not take at once waits here.

    The real agent keeps 512 bytes, and writes them in the round after they have come.
    """

    def __init__(self, loop: Loop, channel: FrameChannel, fd: int, terminal: bool) -> None:
        self._loop = loop
        self._channel = channel
        self._fd: int | None = fd
        self._terminal = terminal
        self._started = time.monotonic()
        self._watched = False
        self._full = False
        self._until_taken: dict[int, Callable[[], None]] = {}
        self._buffer = StdinBuffer(sys.maxsize if channel.lossless else STDIN_SIZE)

    def take(self, payload: bytes) -> None:
        """Take a frame's payload."""
        if payload:
            self._buffer.put(payload)
        elif not self._terminal:
            self._buffer.end()
        if self._channel.lossless:
            self._drain()
        else:
            self._set_watched(self._fd is not None)

    @property
    def is_stuck(self) -> bool:
        """Whether something waits that the process cannot take now."""
        if self._fd is None or not self._buffer:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return not poll.poll(0)

    def when_taken(self, marker: int, callback: Callable[[], None]) -> None:
        """Call back once the process has taken all that waits, or never will; at once if nothing waits.

        A marker sent again replaces the first. The real agent does not wait. But its answer takes
        milliseconds, which hosts rely on: after a faster one, a process that is still loading its program
        would lose stdin. So this waits even without `lossless`, but not for long.
        """
        self._until_taken[marker] = callback
        self._settle()
        if not self._channel.lossless:
            patience = max(_ROUND_TRIP, self._started + _LOADING - time.monotonic())
            self._loop.call_later(patience, partial(self._give_up, marker))

    def close(self) -> None:
        """Give the process end of file now."""
        if self._fd is not None:
            self._set_watched(False)
            os.close(self._fd)
            self._fd = None
        self._settle()

    def _drain(self, _events: int = 0) -> None:
        """Write as much as the process takes now, and the rest when it takes more."""
        if self._fd is None:
            return
        waiting = self._buffer.peek()
        if waiting:
            try:
                self._buffer.consume(os.write(self._fd, waiting))
            except BlockingIOError:
                pass
            except OSError:  # the process reads no more
                self.close()
                return
        if self._buffer.is_over:
            self.close()
        else:
            self._set_watched(len(self._buffer) > 0)
            self._settle()

    def _give_up(self, marker: int) -> None:
        callback = self._until_taken.pop(marker, None)
        if callback is not None:
            callback()

    def _settle(self) -> None:
        """React to a change of what waits."""
        size = 0 if self._fd is None else len(self._buffer)
        if self._channel.lossless and (size > LOSSLESS_WINDOW) != self._full:
            self._full = not self._full
            self._channel.set_full(self, self._full)
        if not size and self._until_taken:
            callbacks, self._until_taken = self._until_taken, {}
            for callback in callbacks.values():
                callback()

    def _set_watched(self, on: bool) -> None:
        if on == self._watched or self._fd is None:
            return
        self._watched = on
        if on:
            self._loop.watch(self._fd, WRITE, self._drain, Turn.PROCESSES)
        else:
            self._loop.forget(self._fd)


class Process:
    """A process from its start until its exit status is sent; then `on_gone` is called.

    It has ended when its program has ended and no process holds its output open any more. Until then it stays
    a zombie, so that no other process group can get its id. The real agent notices the end of a program only
    when it has nothing else to do.
    """

    def __init__(
        self, loop: Loop, channel: FrameChannel, seq: int, child: Child, on_gone: Callable[[Process], None]
    ) -> None:
        self.seq = seq
        self.terminal = child.terminal
        self.stdin = ProcessStdin(loop, channel, child.stdin, child.terminal)
        self._loop = loop
        self._channel = channel
        self._popen = child.popen
        self._outputs = dict(child.outputs)
        self._on_gone = on_gone
        self._pidfd: int | None = child.pidfd
        self._watch_program()
        for fd in self._outputs:
            self._watch_output(fd)

    @property
    def pid(self) -> int:
        """Its process id, which is also the id of its session and process group."""
        return self._popen.pid

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to it, or to its process group. Raises `CommandRefused` if that is not permitted."""
        if self._popen.returncode is not None:
            return  # another process may have its pid now
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except OSError as error:
            raise CommandRefused(f"signal {number}: {error.strerror}") from None

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal. Raises `CommandRefused` if it has none."""
        if not self.terminal:
            raise CommandRefused(f"stream {self.seq} is no terminal")
        for fd, seq in self._outputs.items():
            if seq == self.seq:
                set_size(fd, rows, columns)

    def kill(self) -> None:
        """End it and its group at once; nothing more is sent for it, and `on_gone` is not called."""
        with contextlib.suppress(CommandRefused):  # a setuid program may be out of reach: do not wait for it
            self.signal(signal.SIGKILL, group=True)
            self._popen.wait()
        self.stdin.close()
        self._close_pidfd()
        for fd in list(self._outputs):
            self._close_output(fd)

    def _watch_output(self, fd: int) -> None:
        self._loop.watch(fd, READ, partial(self._read_output, fd), Turn.PROCESSES)

    def _watch_program(self) -> None:
        if self._pidfd is not None:
            turn = Turn.PROCESSES if self._channel.lossless else Turn.LAST
            self._loop.watch(self._pidfd, READ, self._exited, turn)

    def _read_output(self, fd: int, _events: int) -> None:
        room = self._channel.room
        if room <= 0:
            self._loop.forget(fd)
            self._channel.when_drained(partial(self._watch_output, fd))
            return
        try:
            data = os.read(fd, room)
        except BlockingIOError:
            return
        except OSError:  # EIO from a terminal means that no process has it open
            data = b""
        if data:
            self._channel.send(self._outputs[fd], data)
        else:
            self._close_output(fd)
            self._end_if_over()

    def _exited(self, _events: int) -> None:
        if self._channel.is_awaited and not self._channel.lossless and self._pidfd is not None:
            self._loop.forget(self._pidfd)
            self._channel.when_drained(self._watch_program)
            return
        self._close_pidfd()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._pidfd is not None or self._outputs:
            return
        # Like the real agent: a process that is killed by a signal has status 0.
        status = max(0, self._popen.wait())
        if not self._channel.send_end(self.seq, status):
            self._channel.when_drained(self._end_if_over)
            return
        self.stdin.close()
        self._on_gone(self)

    def _close_output(self, fd: int) -> None:
        del self._outputs[fd]
        self._loop.forget(fd)
        os.close(fd)

    def _close_pidfd(self) -> None:
        fd, self._pidfd = self._pidfd, None
        if fd is not None:
            self._loop.forget(fd)
            os.close(fd)
