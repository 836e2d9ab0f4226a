"""The fds of the standard streams. Imports nothing that could open a file."""

import os

_STDERR_FD = 2


def guard_standard_fds() -> None:
    """Occupy those of fds 0 to 2 that are closed, so that no socket takes their place.

    stdin is at its end then, and writing to the others fails as it does on a closed fd.
    """
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= _STDERR_FD:
        os.set_inheritable(fd, True)
    os.close(fd)
