"""The fds of the standard streams. This module imports nothing that could open a file."""

import os
import sys

_STDERR_FD = 2


def guard_standard_fds() -> None:
    """Open whichever of fds 0 to 2 are closed on /dev/null, so that no socket takes their numbers.

    stdin then reads end of file, and writing to the others fails, as on a closed fd.
    """
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= _STDERR_FD:
        os.set_inheritable(fd, True)
    os.close(fd)


def give_up_stderr() -> None:
    """Forget what stderr has not taken: the interpreter would try again at exit, and change the status."""
    try:
        if sys.stderr:
            sys.stderr.flush()
    except OSError:
        sys.stderr = None
