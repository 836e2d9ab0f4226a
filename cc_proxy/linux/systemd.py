"""Talking to the service manager: sd_listen_fds(3) and sd_notify(3)."""

import os
import select
import socket
import time
from collections.abc import Sequence

_FIRST_FD = 3
#: Seconds to wait for a manager that does not read its messages.
_SEND_TIMEOUT = 1.0
#: Seconds to wait until a manager has handled what it was told.
_BARRIER_TIMEOUT = 5


class ActivationError(Exception):
    """The manager passed no single listening AF_UNIX stream socket; the text says what to do."""


def take_stored(prefix: str) -> dict[str, list[int]]:
    """Return the fds that the manager has stored under names that begin with `prefix`, by name.

    It passes them along with the listening socket. Removes them from the environment.
    """
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    others = [name for name in names if not name.startswith(prefix)]
    stored: dict[str, list[int]] = {}
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or others == names:
        return stored
    for fd, name in enumerate(names, _FIRST_FD):
        if name.startswith(prefix):
            os.set_inheritable(fd, False)
            stored.setdefault(name, []).append(fd)
    if others:
        os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"] = str(len(others)), ":".join(others)
    else:
        del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"]
    return stored


def take_listener() -> socket.socket | None:
    """Return the listening socket that was passed to this process, or None if none was.

    Removes LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES from the environment, so that no child takes them for
    its own. Raises `ActivationError`.
    """
    pid, count = os.environ.pop("LISTEN_PID", None), os.environ.pop("LISTEN_FDS", None)
    names = os.environ.pop("LISTEN_FDNAMES", "")
    if pid != str(os.getpid()) or not count:
        return None
    if count != "1" or ":" in names:
        which = f" ({names.replace(':', ', ')})" if names else ""
        raise ActivationError(
            f"LISTEN_FDS={count}{which}, but cc-proxy takes exactly one socket: "
            "leave one ListenStream= in cc-proxy.socket, and no other socket unit for this service"
        )
    try:
        sock = socket.socket(fileno=_FIRST_FD)
    except OSError as error:
        raise ActivationError(
            f"fd {_FIRST_FD}, passed as a socket, is none: {error.strerror}; "
            "start the service with ListenStream= in cc-proxy.socket, or without any socket unit"
        ) from None
    wrong = _what_is_wrong(sock)
    if wrong:
        sock.close()
        raise ActivationError(f"the socket passed is not a listening AF_UNIX stream socket: {wrong}")
    sock.set_inheritable(False)
    return sock


def _what_is_wrong(sock: socket.socket) -> str:
    """Return what is wrong with a socket, and what to do; empty if nothing is."""
    if sock.family != socket.AF_UNIX:
        return "it is a network socket; give ListenStream= in cc-proxy.socket a path"
    if sock.type != socket.SOCK_STREAM:
        return "it is for datagrams or packets; use ListenStream= in cc-proxy.socket"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "it does not listen; set Accept=no in cc-proxy.socket"
    return ""


class Notifier:
    """Reports to the service manager, if there is one that wants reports.

    Removes NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID from the environment. One thread.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        #: The manager expects a sign of life within this many seconds; None if it expects none.
        self.watchdog = _watchdog_seconds()
        #: Why the last message could not be sent; empty if it was.
        self.error = ""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # Kept open, so that there is one even when there are no fds left.
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address[:1] in ("@", "/") else None

    @property
    def wanted(self) -> bool:
        """Whether there is a manager that wants reports."""
        return self._sock is not None

    def tell(self, *assignments: str, wait: bool = True, fds: Sequence[int] = ()) -> bool:
        """Send `NAME=value` assignments, and fds with them; returns whether they were sent.

        With `wait`, waits up to a second for a manager that does not read them.
        """
        if self._sock is None:
            return False
        try:
            # One on each line, so a value must not contain a newline.
            text = "\n".join(assignment.replace("\n", " ") for assignment in assignments)
            # Connected each time, because a restarted manager has a new socket. And connected at all, because
            # poll(2) calls an unconnected datagram socket writable, so waiting would spin.
            self._sock.settimeout(_SEND_TIMEOUT if wait else 0.0)
            self._sock.connect(self._address)
            if fds:
                socket.send_fds(self._sock, [text.encode()], fds)
            else:
                self._sock.send(text.encode(errors="replace"))
        except (OSError, ValueError) as error:
            self.error = str(error)
            return False
        self.error = ""
        return True

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Have the manager keep fds for the next process; returns once it has taken or refused them.

        False if it could not be told, or did not handle it in time.
        """
        return self.tell("FDSTORE=1", f"FDNAME={name}", fds=fds) and self.is_heard()

    def is_heard(self) -> bool:
        """Wait until the manager has handled all that it was told.

        False if it does not within 5 seconds, or if it cannot be asked because no fd is left.
        """
        try:
            ours, theirs = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            self.error = str(error)
            return False
        try:
            told = self.tell("BARRIER=1", fds=[theirs])
        finally:
            os.close(theirs)
        try:
            poll = select.poll()
            poll.register(ours, 0)
            return told and bool(poll.poll(_BARRIER_TIMEOUT * 1000))
        finally:
            os.close(ours)

    def close(self) -> None:
        """Close the socket."""
        if self._sock:
            self._sock.close()
            self._sock = None


def monotonic_usec() -> str:
    """Return the assignment that must accompany RELOADING=1."""
    return f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def _watchdog_seconds() -> float | None:
    usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", None)
    if pid not in (None, str(os.getpid())) or not usec.isdecimal() or not int(usec):
        return None
    return int(usec) / 1_000_000
