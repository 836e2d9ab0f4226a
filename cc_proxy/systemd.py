"""What systemd passes to a service it has activated (sd_listen_fds(3))."""

import os
import socket

_FIRST_FD = 3


class ActivationError(Exception):
    """What was passed is not one listening AF_UNIX stream socket; the text says what it is."""


def take_listener() -> socket.socket | None:
    """Return the listening socket this process was started with, or None if it was started without.

    Takes LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES out of the environment, so that no child believes them.
    Raises `ActivationError`.
    """
    pid, count = os.environ.pop("LISTEN_PID", None), os.environ.pop("LISTEN_FDS", None)
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return None
    if count != "1":
        raise ActivationError(f"LISTEN_FDS={count}: expected exactly one socket")
    try:
        sock = socket.socket(fileno=_FIRST_FD)
    except OSError as error:
        raise ActivationError(f"fd {_FIRST_FD}, passed as a socket, is none: {error.strerror}") from None
    kind = (sock.family, sock.type, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        sock.close()
        raise ActivationError("the socket passed is not a listening AF_UNIX stream socket")
    sock.set_inheritable(False)
    sock.setblocking(True)
    return sock
