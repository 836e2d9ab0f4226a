"""The clients' side: accepts connections and serves each in a thread of its own (docs/protocol.md, 1)."""

import contextlib
import errno
import functools
import itertools
import math
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cc_proxy.access import may_connect
from cc_proxy.linux.credentials import Credentials
from cc_proxy.linux.fds import close_stream, holds_fds, may_hold_fds
from cc_proxy.linux.threads import check_room, start_thread
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.arrivals import Arrivals
from cc_proxy.proxy.clients.connection import Connection
from cc_proxy.proxy.clients.handlers import Client, Handlers, failure
from cc_proxy.proxy.clients.listener import Listener
from cc_proxy.proxy.clients.parking import Idle
from cc_proxy.proxy.clients.status import About
from cc_proxy.proxy.clients.workers import Crew
from cc_proxy.proxy.users import LimitReached, Share
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import Limits, LiveSettings

#: Threads that wait for the interpreter ask for it this often, in seconds.
_SWITCH_INTERVAL = 0.001
#: Seconds that the accept thread leaves to others after a connection that came too early. More come, and to
#: accept them as fast as it can is to hold the interpreter, which a thread that is quick gets back each time.
_BREATH = 0.000_1
#: So many connections are accepted before the next one is served: few enough that it does not wait long for
#: them, and enough that all who wait are soon known.
_AT_ONCE = 16
#: Seconds until the accept thread notices that it is to stop.
_STOP_POLL = 0.25
#: Seconds at the end in which those who wait are still served. There may be as many as users like, and each
#: takes a thread; who waits longer is hung up on.
_LAST_SERVED = 2.0
#: Seconds to wait when accept(2) fails: there is no room for another connection, or whatever it says.
_SHORTAGE_PAUSE = 0.1
_NO_THREAD = "the daemon cannot start another thread"


class Server(socketserver.ThreadingUnixStreamServer):
    """Owner of the listening socket, and of the connections that are accepted on it."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listener: Listener, registry: Registry, live: LiveSettings, about: About | None = None
    ) -> None:
        super().__init__(listener.socket.getsockname(), Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener.socket
        self._listener = listener
        self._live = live
        self.handlers = Handlers(registry, live, about)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards _connections; nothing else is locked while it is held
        self._connections: dict[socket.socket, Share] = {}
        self._arrivals: Arrivals[tuple[socket.socket, Client]] = Arrivals()
        self._crew = Crew()
        self.shares = registry.shares
        self._stopping = threading.Event()
        self._serve_until = math.inf  # time.monotonic's
        #: Where connections' threads wait.
        self.idle = Idle(lambda: not self.shares.several)
        self.idle.admit(os.geteuid())
        self._short = False
        #: When the accept thread has last finished what it had to do; time.monotonic's.
        self.turned_at = 0.0
        self._thread = threading.Thread(target=self._accept_all, name="accept", daemon=True)

    # Main thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to accept connections, in a thread of its own."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self.idle.start()
        self.turned_at = time.monotonic()
        self._thread.start()

    def stop_accepting(self) -> None:
        """Accept no more, and read no more requests; those that have arrived are still answered.

        Who has connected to a socket of our own is not left to wait for nobody, if there is time for all of
        them; who has connected to an inherited one will be served by our successor.
        """
        self._serve_until = time.monotonic() + _LAST_SERVED
        self._stopping.set()
        self.shutdown()
        self._thread.join()
        self._listener.remove()
        self._serve_all()  # the accept thread may have failed, and not begun again
        if self._listener.own:
            self._accept_waiting()
        self.socket.close()
        self.idle.call_all()
        self._crew.close()
        self._shut_down_connections(socket.SHUT_RD)

    def join_connections(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the connections to end; returns whether all have."""
        return self._crew.join(timeout)

    def hang_up(self) -> None:
        """Close the connections that are left."""
        self._shut_down_connections(socket.SHUT_RDWR)

    def server_close(self) -> None:
        """Give back what is left when everybody has gone, or had the time to."""
        super().server_close()
        self.idle.close()

    def _accept_waiting(self) -> None:
        """Serve who waits. No more come: a socket that has been removed can still be connected to."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)
            while True:
                self._accept_one()
                self._serve_all()

    def _shut_down_connections(self, how: int) -> None:
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(how)

    # Accept thread ----------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        """Accept connections until the end, whatever happens."""
        # At least once, however early the end comes: `shutdown` waits until this has been left.
        while True:
            try:
                self.serve_forever(_STOP_POLL)
            except Exception:
                faults.note("accepting connections failed")
                self._stopping.wait(_SHORTAGE_PAUSE)
            if self._stopping.is_set():
                return

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. While there is no room for one, wait a little instead of spinning."""
        if self._stopping.is_set():
            raise OSError(errno.ESHUTDOWN, "no more connections are accepted")
        try:
            request: tuple[socket.socket, Any] = self.socket.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._wait_for_room(error)
            raise
        self._short = False
        return request

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Take a connection in. It is served after that: what fails there has nothing to do with this one."""
        self._take_in(request)

    def service_actions(self) -> None:
        """Called after each look for connections, whether there was one or not."""
        self._serve_all()
        self.turned_at = time.monotonic()

    def _serve_all(self) -> None:
        """Have all who wait served, and those who come meanwhile: one of each user's in turn.

        Whoever comes behind a thousand of somebody else's has not waited for these, then.
        """
        while (arrival := self._arrivals.take()) is not None:
            try:
                self._serve_in_time(*arrival)
            except Exception:
                self._give_up(*arrival)
            self._take_in_some()
            self.turned_at = time.monotonic()

    def _take_in_some(self) -> None:
        """Accept some of those who wait, if any do."""
        # A shortage is waited out once nobody is left who has been accepted: `get_request` does.
        with contextlib.suppress(OSError):
            for _ in range(_AT_ONCE):
                if self._stopping.is_set():
                    return
                self._accept_one()

    def _accept_one(self) -> None:
        """Accept one of those who wait. Raises `OSError` if nobody does."""
        request, _ = self.socket.accept()
        try:
            self._take_in(request)
        except Exception:
            self._give_up(request)

    def _take_in(self, request: socket.socket) -> None:
        """Count a connection and see to it that it will be served, if whoever made it may connect."""
        who = Credentials.of_peer(request)
        if not may_connect(self._live.current.access, who):
            self._turn_away(
                request, who, f"user {who.uid} may not connect: [access] in the settings names who may"
            )
            return
        share = self.shares.of(who.uid)
        try:
            self._admit(request, share)
        except (LimitReached, OSError) as error:
            self._turn_away(request, who, str(error))
            return
        except RuntimeError:
            self._turn_away(request, who, _NO_THREAD)
            return
        self._arrivals.add(who.uid, (request, Client(next(self._numbers), who, share)))

    def _serve_in_time(self, request: socket.socket, client: Client) -> None:
        """Have a connection served; a little later, if its user makes them too fast."""
        wait = client.share.arrive()
        if not wait:
            self._hand_over(request, client)
            return
        self.idle.call_later(wait, lambda: self._hand_over(request, client))
        self._stopping.wait(_BREATH)

    def _admit(self, request: socket.socket, share: Share) -> None:
        """Count a connection of a user's. Raises `LimitReached`, `OSError` or `RuntimeError`."""
        check_room()  # it may get its thread much later, and thousands may wait for theirs
        with contextlib.ExitStack() as undo:
            share.take("connections")
            undo.callback(share.give_back, "connections")
            self.idle.admit(share.uid)
            undo.callback(self.idle.dismiss, share.uid)
            with self._lock:
                self._connections[request] = share
            undo.pop_all()

    def _wait_for_room(self, error: OSError) -> None:
        if not self._short:
            logger.error("no connection can be accepted", extra={"error": error.strerror})
        self._short = True
        self._stopping.wait(_SHORTAGE_PAUSE)

    def _turn_away(self, request: socket.socket, who: Credentials, why: str) -> None:
        logger.warning("connection refused", extra={"pid": who.pid, "uid": who.uid, "error": why})
        with contextlib.suppress(OSError):
            request.send(failure(why).message, socket.MSG_DONTWAIT)
        self.shutdown_request(request)

    # Accept thread, the thread that wakes, or at the end the main thread ----------------------------------

    def _hand_over(self, request: socket.socket, client: Client) -> None:
        """Have a connection served in a thread of its own."""
        if time.monotonic() > self._serve_until:
            self.shutdown_request(request)
            return
        try:
            try:
                self._crew.hand_over(f"client {client.number}", lambda: self._serve(request, client))
            except RuntimeError:
                self._turn_away(request, client.who, _NO_THREAD)
        except Exception:  # there may not even be memory for the refusal
            self._give_up(request, client)

    def _give_up(self, request: socket.socket, client: Client | None = None) -> None:
        """Close a connection that nobody serves, for an error that nobody expected."""
        try:
            self.handle_error(request, client)
        finally:  # to say so takes memory, of which there may be none
            self.shutdown_request(request)

    # A connection's thread --------------------------------------------------------------------------------

    def _serve(self, request: socket.socket, client: Client) -> None:
        try:
            self.finish_request(request, client)
        except Exception:
            self.handle_error(request, client)
        finally:
            self._close(request)

    # Any thread -------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """What the settings say now."""
        return self._live.current.limits

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be had within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that nobody serves."""
        close = functools.partial(self._close, request)
        # The accept thread does not wait for what may take as long as a stranger likes.
        if not _may_take_long(request) or not _begin(close):
            close()

    def _close(self, request: socket.socket) -> None:
        """Close a connection; if it was admitted, it counts for as long as that takes."""
        with self._lock:
            share = self._connections.pop(request, None)
        try:
            close_stream(request)
        finally:
            if share:
                self.idle.dismiss(share.uid)
                share.give_back("connections")

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log an error that nobody expected; it costs this connection and nothing else."""
        client = client_address.number if isinstance(client_address, Client) else None
        faults.note("connection failed", client=client)


def _may_take_long(request: socket.socket) -> bool:
    """Whether closing a connection may; what its client has sent so far is all that can be on it then."""
    if not may_hold_fds(request):
        return False
    try:
        request.shutdown(socket.SHUT_RD)
        return holds_fds(request)
    except OSError:  # the client has gone, and may have left anything
        return True


def _begin(function: Callable[[], None]) -> bool:
    """Call a function in a thread of its own, if there is one to be had."""
    try:
        start_thread(threading.Thread(target=function, name="farewell", daemon=True))
    except RuntimeError:
        return False
    return True
