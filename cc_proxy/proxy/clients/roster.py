"""The connections that are open."""

import contextlib
import socket
import threading

from cc_proxy.linux.fds import close_stream, holds_fds, may_hold_fds
from cc_proxy.proxy.users import Charge


class Roster:
    """Owns the sockets of all open connections, and the charge for each. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _charges, and setting _empty to match; innermost
        self._charges: dict[socket.socket, Charge] = {}
        self._empty = threading.Event()  # set while there are none
        self._empty.set()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._charges)

    def add(self, sock: socket.socket, charge: Charge) -> None:
        """Take over a connection and its charge. If that fails, the charge is given back."""
        try:
            with self._lock:
                self._charges[sock] = charge
                self._empty.clear()
        except BaseException:
            charge.give_back()
            raise

    def close(self, sock: socket.socket) -> None:
        """Close a connection, which need not be in the roster. It is charged for until that is done."""
        try:
            close_stream(sock)
        finally:
            with self._lock:
                charge = self._charges.pop(sock, None)
                if not self._charges:
                    self._empty.set()
            if charge:
                charge.give_back()

    def shut_down(self, how: int) -> None:
        """Shut down all connections (`socket.SHUT_RD`, and so on)."""
        with self._lock:
            for sock in self._charges:
                with contextlib.suppress(OSError):
                    sock.shutdown(how)

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for all to be closed; returns whether they are."""
        return self._empty.wait(timeout)

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be taken within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free


def may_take_long(sock: socket.socket) -> bool:
    """Whether closing a connection may take long. If so, it is shut down for reading."""
    if not may_hold_fds(sock):
        return False
    try:
        sock.shutdown(socket.SHUT_RD)
        return holds_fds(sock)
    except OSError:  # the client has gone, and may have left fds
        return True
