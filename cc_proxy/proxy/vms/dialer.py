"""Connecting to what a client names: as that client, and never to the daemon itself."""

import os
import socket

from cc_proxy.api.deadline import Deadline
from cc_proxy.api.errors import TimedOut
from cc_proxy.api.transport import connect_socket
from cc_proxy.linux.credentials import CannotAct, Credentials, call_as
from cc_proxy.linux.fds import refuse_rights
from cc_proxy.linux.socketfile import MAX_SOCKET_PATH
from cc_proxy.proxy.users import Share

#: Seconds that others of the same user are waited for at least: it takes most of them a moment.
_COURTESY = 0.2


class _NoTurn(Exception):
    """Others of the same user were connecting all the time."""


class CannotConnect(Exception):
    """A socket that cannot be connected to; the text names the member of hello, and says why."""


class Dialer:
    """Connects on behalf of one client. Any thread.

    The kernel judges each step of a path, and the socket at its end, as it would for the client itself, while
    it connects: there is no look before that which could be out of date by then. Who listens there sees the
    client's uid and gid.
    """

    def __init__(self, client: Credentials, share: Share, own_address: str | bytes | None = None) -> None:
        """`own_address` is the name that the daemon's listening socket was bound to."""
        self.client = client
        self.share = share
        self._own_address = own_address

    def connect(self, member: str, path: str, timeout: float | Deadline) -> socket.socket:
        """Connect to the socket at `path`, waiting `timeout` seconds if its backlog is full.

        `member` is what clients call it. Raises `CannotConnect`, or `RuntimeError` if there is no thread.
        """
        _check(member, path)
        deadline = Deadline(timeout)
        try:
            try:
                return self._connect_at_once(path, deadline)
            except BlockingIOError:  # to wait for somebody is nothing that others should wait for
                return call_as(self.client, lambda: self._connect(path, deadline))
        except CannotAct as error:
            raise CannotConnect(f"{member}: {error}") from None
        except _NoTurn:
            raise CannotConnect(
                f"{member}: cannot connect to {path}: others of the same user had their turn all the time"
            ) from None
        except TimedOut:
            raise CannotConnect(f"{member}: cannot connect to {path}: not accepted in time") from None
        except OSError as error:
            raise CannotConnect(f"{member}: cannot connect to {path}: {error.strerror}") from None

    def _connect_at_once(self, path: str, deadline: Deadline) -> socket.socket:
        """Raises `BlockingIOError` if the backlog is full; or `_NoTurn`."""
        if not self.share.dialing.acquire(timeout=max(_COURTESY, deadline.remaining())):
            raise _NoTurn
        try:
            return call_as(self.client, lambda: self._connect(path, 0))
        except TimedOut:
            raise BlockingIOError from None
        finally:
            self.share.dialing.release()

    def _connect(self, path: str, timeout: float | Deadline) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            refuse_rights(sock)  # before anybody can pass one
            connect_socket(sock, path, timeout)
            # Whatever links and mounts led there, this is the name it was bound to.
            if self._own_address is not None and sock.getpeername() == self._own_address:
                raise OSError(0, "that is the daemon itself")
        except BaseException:
            sock.close()
            raise
        return sock


def _check(member: str, path: str) -> None:
    """Refuse what is no place in the file system. Raises `CannotConnect`."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise CannotConnect(f"{member}: a path of {size} bytes, the limit is {MAX_SOCKET_PATH}")
    if not path.startswith("/") or "\0" in path:
        raise CannotConnect(f"{member}: not an absolute path: {path!r}")
