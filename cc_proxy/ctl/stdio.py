"""The standard streams of this command, used so that the loop in `relay` never blocks on one.

Their fds stay in the mode they are in: what they are open on is shared with other processes, a shell to
begin with, that do not expect a non-blocking terminal.
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

#: Read from stdin at once: whole frames.
_READ_SIZE = 8 * MAX_STDIN_PAYLOAD
#: Ctrl-D.
_VEOF = b"\x04"
#: A pipe that can be written to takes as much without blocking.
_PIECE = select.PIPE_BUF

_NAMES = {STDOUT_FD: "standard output", STDERR_FD: "standard error"}


def show(text: str = "") -> None:
    """Print on stdout what there is to print, and see to it that it is written.

    Raises what writing a process's output does.
    """
    if sys.stdout is None:
        return  # closed from the start
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Or the interpreter would try once more, and complain.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), STDOUT_FD)
        raise _unwritten(STDOUT_FD, error) from None


class Stdin:
    """Reads stdin as frames, one piece at a time: `frames` is what has to be sent before there is more."""

    def __init__(self, io_base: int, *, forward: bool, terminal: bool) -> None:
        self._io_base = io_base
        self._open = forward
        self._terminal = terminal
        #: Frames that are to be sent. A terminal has no end of file.
        self.frames = b"" if forward or terminal else stdin_frames(io_base, b"")

    def wants(self) -> Wanted:
        """Read on once everything was sent."""
        return (STDIN_FD, select.POLLIN) if self._open and not self.frames else NOTHING

    def handle(self, _events: int) -> None:
        """Read what there is. Raises `Failure`, or `Interrupted` if the terminal has hung up."""
        data = self._read()
        if data is None:
            return
        if not data and self._terminal:
            raise Interrupted(signal.SIGHUP)
        self._open = bool(data)
        self.frames = stdin_frames(self._io_base, data)

    def close(self) -> None:
        """Read no more: nobody takes it."""
        self._open = False
        self.frames = b""

    def end(self) -> None:
        """Nothing else can come: put the end behind what is there. To a terminal that is a key like others.

        One that is as its maker left it takes VEOF for an end of file, unless a line is half typed.
        """
        if self._terminal or self._open:
            self.frames += stdin_frames(self._io_base, _VEOF if self._terminal else b"")
        self._open = False

    def _read(self) -> bytes | None:
        try:
            return os.read(STDIN_FD, _READ_SIZE)
        except BlockingIOError:  # whoever opened it made it non-blocking, and somebody else was faster
            return None
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal that has hung up, or that is not ours
                return b""
            raise Failure(f"cannot read standard input: {reason(error)}") from None


class Output:
    """What waits to be written to stdout and stderr, in the order in which it came."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, memoryview]] = deque()
        #: What each is written through.
        self._fds = {fd: _own_handle(fd) for fd in _NAMES}
        #: Bytes that wait.
        self.size = 0

    @property
    def stalled(self) -> bool:
        """Whether something waits that nobody takes now."""
        return bool(self._waiting) and not _takes_a_piece(self._first())

    def close(self) -> None:
        """Close the handles of its own. What waits is not written any more."""
        for standard, fd in self._fds.items():
            if fd != standard:
                os.close(fd)

    def push(self, fd: int, data: bytes) -> None:
        """Have `data` written to `fd` after all that waits already."""
        self._waiting.append((fd, memoryview(data)))
        self.size += len(data)

    def wants(self) -> Wanted:
        """Write what is first in line."""
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
    """Return a non-blocking handle of the terminal behind `fd`; of what is none, or not ours, `fd` itself.

    A terminal says that it can be written to when there is room for a single byte.
    """
    if os.isatty(fd):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


def _takes_a_piece(fd: int) -> bool:
    """Asked before each piece: stdout and stderr may be the same pipe, and others may write to it too."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _unwritten(fd: int, error: OSError) -> Failure | Interrupted:
    """Return what follows from an output that cannot be written to."""
    if isinstance(error, BrokenPipeError):
        return Interrupted(signal.SIGPIPE)
    return Failure(f"cannot write to {_NAMES[fd]}: {reason(error)}")
