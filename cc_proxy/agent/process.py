"""One process of a pod: its streams, its signals and its end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Protocol

from cc_proxy.agent.errors import Refused
from cc_proxy.agent.inbound import StdinBuffer
from cc_proxy.agent.loop import READ, WRITE, Loop
from cc_proxy.agent.spawn import Child, set_size


class Channel(Protocol):
    """What a process needs of the I/O channel."""

    @property
    def room(self) -> int:
        """Bytes of payload that a frame may have now; 0 or less if there is no room for one."""

    def send(self, seq: int, payload: bytes) -> None:
        """Send a frame for which there is room."""

    def send_end(self, seq: int, status: int) -> bool:
        """Send what says that a process has ended; False if there is no room."""

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once, when all the room there can be is there."""

    def stdin_stuck(self, stdin: Stdin, stuck: bool) -> None:
        """Called when a process does not take what waits for it, and when it has."""


class Stdin:
    """The way into a process: what it does not take at once waits in the 512 bytes there are."""

    def __init__(self, loop: Loop, channel: Channel, fd: int, terminal: bool) -> None:
        self._loop = loop
        self._channel = channel
        self._fd: int | None = fd
        self._terminal = terminal
        self._stuck = False
        self._buffer = StdinBuffer()

    def take(self, payload: bytes) -> None:
        """Take a frame's payload; nothing is written to the process before `drain`."""
        if payload:
            self._buffer.put(payload)
        elif not self._terminal:
            self._buffer.end()

    def drain(self, _events: int = 0) -> None:
        """Let the process have as much as it takes now, and the rest when it takes more."""
        if self._fd is None:
            return
        waiting = self._buffer.peek()
        if waiting:
            try:
                self._buffer.consume(os.write(self._fd, waiting))
            except BlockingIOError:
                pass
            except OSError:  # it reads no more
                self.close()
                return
        if self._buffer.is_over:
            self.close()
        else:
            self._set_stuck(bool(self._buffer.peek()))

    def close(self) -> None:
        """Let the process see end of file, now."""
        if self._fd is not None:
            self._set_stuck(False)
            os.close(self._fd)
            self._fd = None

    def _set_stuck(self, stuck: bool) -> None:
        if stuck == self._stuck or self._fd is None:
            return
        self._stuck = stuck
        if stuck:
            self._loop.watch(self._fd, WRITE, self.drain)
        else:
            self._loop.forget(self._fd)
        self._channel.stdin_stuck(self, stuck)


class Process:
    """A process from its start until its exit status is sent; then `on_gone` is called.

    It has ended when its program has and nobody holds its output open any more. Until then it stays a
    zombie, so that its process group is certain to be its own.
    """

    def __init__(
        self, loop: Loop, channel: Channel, seq: int, child: Child, on_gone: Callable[[Process], None]
    ) -> None:
        self.seq = seq
        self.terminal = child.terminal
        self.stdin = Stdin(loop, channel, child.stdin, child.terminal)
        self._loop = loop
        self._channel = channel
        self._popen = child.popen
        self._outputs = dict(child.outputs)
        self._on_gone = on_gone
        self._pidfd: int | None = child.pidfd
        loop.watch(child.pidfd, READ, self._exited)
        for fd in self._outputs:
            self._watch_output(fd)

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its session and process group."""
        return self._popen.pid

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to it, or to its whole process group. Raises `Refused` if that is not permitted."""
        if self._popen.returncode is not None:
            return  # its number is anybody's now
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except OSError as error:
            raise Refused(f"signal {number}: {error.strerror}") from None

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal. Raises `Refused` if it has none."""
        if not self.terminal:
            raise Refused(f"stream {self.seq} is no terminal")
        for fd, seq in self._outputs.items():
            if seq == self.seq:
                set_size(fd, rows, columns)

    def kill(self) -> None:
        """End it and its group at once; nothing of it is sent any more, and `on_gone` is not called."""
        with contextlib.suppress(Refused):  # it may have become somebody else, who is not waited for
            self.signal(signal.SIGKILL, group=True)
            self._popen.wait()
        self.stdin.close()
        self._close_pidfd()
        for fd in list(self._outputs):
            self._close_output(fd)

    def _watch_output(self, fd: int) -> None:
        self._loop.watch(fd, READ, partial(self._read_output, fd))

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
        except OSError:  # EIO is how a terminal says that nobody has it open
            data = b""
        if data:
            self._channel.send(self._outputs[fd], data)
        else:
            self._close_output(fd)
            self._end_if_over()

    def _exited(self, _events: int) -> None:
        self._close_pidfd()
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._pidfd is not None or self._outputs:
            return
        # A signal's number goes nowhere: who is killed by one has status 0.
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
