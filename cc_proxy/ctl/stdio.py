"""The standard streams of this command, used in such a way that the loop in `relay` never blocks on one.

The mode of their fds does not change: other processes, such as the shell, share the open file behind them,
and do not expect a non-blocking terminal.
"""

import errno
import os
import select
import signal
import sys
from collections import deque
from contextlib import suppress

from cc_proxy.ctl.errors import Failure, Interrupted, reason
from cc_proxy.ctl.relay import NOTHING, Wanted
from cc_proxy.ctl.streams import MAX_STDIN_PAYLOAD, STDERR_FD, STDOUT_FD, stdin_frames

STDIN_FD = 0

#: Bytes to read from stdin at once: they fill whole frames.
_READ_SIZE = 8 * MAX_STDIN_PAYLOAD
#: Ctrl-D.
_VEOF = b"\x04"
#: A pipe that poll(2) calls writable takes this much without blocking.
_PIECE = select.PIPE_BUF

_NAMES = {STDOUT_FD: "standard output", STDERR_FD: "standard error"}


def show(text: str = "") -> None:
    """Print on stdout, and flush it.

    Raises `Failure`, or `Interrupted` if nobody reads it.
    """
    if sys.stdout is None:
        return  # closed from the start
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Otherwise Python would try to write again at exit, and complain.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), STDOUT_FD)
        raise _unwritten(STDOUT_FD, error) from None


class StdinSource:
    """Reads stdin as frames, piece by piece: the next piece is read when `frames` has been sent."""

    def __init__(self, io_base: int, *, forward: bool, terminal: bool) -> None:
        self._io_base = io_base
        self._open = forward
        self._terminal = terminal
        #: Frames to be sent. Without `forward` that is an end of file, except for a terminal, which has none.
        self.frames = b"" if forward or terminal else stdin_frames(io_base, b"")

    def wants(self) -> Wanted:
        """Read when everything has been sent."""
        return (STDIN_FD, select.POLLIN) if self._open and not self.frames else NOTHING

    def handle(self, _events: int) -> None:
        """Read what has arrived. Raises `Failure`, or `Interrupted` if the terminal has hung up."""
        data = self._read()
        if data is None:
            return
        if not data and self._terminal:
            raise Interrupted(signal.SIGHUP)
        self._open = bool(data)
        self.frames = stdin_frames(self._io_base, data)

    def close(self) -> None:
        """Stop reading: nobody takes stdin any longer."""
        self._open = False
        self.frames = b""

    def end(self) -> None:
        """Append an end of file, since this command ends. For a terminal that is a key, Ctrl-D.

        A terminal in its usual mode takes that key for end of file, unless a line is half typed.
        """
        if self._terminal or self._open:
            self.frames += stdin_frames(self._io_base, _VEOF if self._terminal else b"")
        self._open = False

    def _read(self) -> bytes | None:
        try:
            return os.read(STDIN_FD, _READ_SIZE)
        except BlockingIOError:  # stdin is non-blocking, and another process was first to read
            return None
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal has hung up, or this command is in the background
                return b""
            raise Failure(f"cannot read standard input: {reason(error)}") from None


class OutputWriter:
    """Writes output to stdout and stderr, in the order in which it came."""

    def __init__(self) -> None:
        #: What waits to be written: each time the standard fd and the data.
        self._waiting: deque[tuple[int, memoryview]] = deque()
        #: For each standard fd the fd through which it is written.
        self._fds = {fd: _own_handle(fd) for fd in _NAMES}
        #: How many bytes wait to be written.
        self.size = 0

    @property
    def stalled(self) -> bool:
        """Whether output waits because nobody reads it."""
        return bool(self._waiting) and not _takes_a_piece(self._first())

    def close(self) -> None:
        """Close our own handles. What still waits is lost."""
        for standard, fd in self._fds.items():
            if fd != standard:
                os.close(fd)

    def push(self, fd: int, data: bytes) -> None:
        """Write `data` to `fd` after everything that waits already."""
        self._waiting.append((fd, memoryview(data)))
        self.size += len(data)

    def wants(self) -> Wanted:
        """Write to the fd of what came first, if anything waits."""
        return (self._first(), select.POLLOUT) if self._waiting else NOTHING

    def handle(self, _events: int) -> None:
        """Write what the fds take. Raises `Failure`, or `Interrupted` with SIGPIPE if nobody reads them."""
        while self._waiting and _takes_a_piece(self._first()):
            standard, data = self._waiting[0]
            written = self._write(standard, data[:_PIECE])
            self.size -= written
            self._waiting[0] = standard, data[written:]
            if written == len(data):
                self._waiting.popleft()
            elif not written:
                return

    def _first(self) -> int:
        return self._fds[self._waiting[0][0]]

    def _write(self, standard: int, piece: memoryview) -> int:
        try:
            return os.write(self._fds[standard], piece)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _unwritten(standard, error) from None


def _own_handle(fd: int) -> int:
    """Return a non-blocking fd of our own for the terminal behind `fd`; `fd` itself if there is none.

    poll(2) calls a terminal writable when it has room for a single byte, so a longer write could block. If we
    may not open the terminal, `fd` itself has to do.
    """
    if os.isatty(fd):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


def _takes_a_piece(fd: int) -> bool:
    """Whether `fd` is writable. To be asked before each piece, since others may write to the same pipe."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _unwritten(fd: int, error: OSError) -> Failure | Interrupted:
    """Return the exception for an output that cannot be written to."""
    if isinstance(error, BrokenPipeError):
        return Interrupted(signal.SIGPIPE)
    return Failure(f"cannot write to {_NAMES[fd]}: {reason(error)}")
