"""The clients' side: accepts connections, and sees to it that each is served (docs/protocol.md, 1)."""

import contextlib
import errno
import itertools
import socket
import socketserver
import sys
import threading
import time
from typing import Any

from cc_proxy.access import may_connect
from cc_proxy.linux.credentials import Credentials
from cc_proxy.linux.fds import close_stream, holds_fds, may_hold_fds
from cc_proxy.linux.threads import check_room
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.connection import After, Connection
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers, failure
from cc_proxy.proxy.clients.listener import Listener
from cc_proxy.proxy.clients.parking import Parking
from cc_proxy.proxy.clients.status import About
from cc_proxy.proxy.clients.workers import Workers
from cc_proxy.proxy.users import Charge, LimitReached
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.settings import Limits, LiveSettings

#: Threads that wait for the GIL ask for it this often, in seconds. CPython's own 5 ms would show in each
#: request.
_SWITCH_INTERVAL = 0.001
#: Seconds until the accept thread notices that it is to stop.
_STOP_POLL = 0.25
#: Seconds to wait when accept(2) fails: there is no room for another connection, or whatever it says.
_SHORTAGE_PAUSE = 0.1
_NO_THREAD = "the daemon cannot start another thread"


class Server(socketserver.ThreadingUnixStreamServer):
    """Owner of the listening socket, and of the connections that are accepted on it.

    A connection has a thread from the first byte of a request to the last byte of its answer. In between it
    is parked: thousands of clients may be connected, and few of them have something to say.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listener: Listener, registry: Registry, live: LiveSettings, about: About | None = None
    ) -> None:
        # The class of handlers is never used: socketserver's live no longer than one call.
        address = listener.socket.getsockname()
        super().__init__(address, socketserver.BaseRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener.socket
        self._listener = listener
        self._live = live
        self._users = registry.users
        self._handlers = Handlers(registry, live, about)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards _connections, and _empty with it; innermost
        self._connections: dict[socket.socket, Charge] = {}
        self._empty = threading.Event()  # set while there are no connections
        self._empty.set()
        self._workers = Workers()
        #: Where connections wait for their clients.
        self.parking: Parking[Connection] = Parking(self._on_leave)
        self._stopping = threading.Event()
        self._short = False
        #: When the accept thread last finished what it had to do; time.monotonic's.
        self.turned_at = 0.0
        self._thread = threading.Thread(target=self._accept_all, name="accept", daemon=True)

    # Main thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to accept connections, in a thread of its own."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self.parking.start()
        self.turned_at = time.monotonic()
        self._thread.start()

    def stop_accepting(self) -> None:
        """Accept no more connections, and read no more requests; those that have arrived are still answered.

        Clients that have connected to a socket of our own are served: nobody else will. Those that have
        connected to an inherited one are left to the next process.
        """
        self._stopping.set()
        self.shutdown()
        self._thread.join()
        self._listener.remove()
        if self._listener.own:
            self._accept_waiting()
        self.socket.close()
        self._shut_down_connections(socket.SHUT_RD)

    def join_connections(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the connections to end; returns whether all have."""
        return self._empty.wait(timeout)

    def hang_up(self) -> None:
        """Close the connections that are left."""
        self._shut_down_connections(socket.SHUT_RDWR)

    def server_close(self) -> None:
        """Give back what is left when all connections have ended, or had the time to."""
        super().server_close()
        self.parking.close()
        self._workers.close()

    def _accept_waiting(self) -> None:
        """Serve the clients that wait, and let no more come: a removed socket can still be connected to."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)
            while True:
                self.process_request(*self.socket.accept())

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
        """Take a connection in, and park it until its client says something."""
        try:
            self._take_in(request)
        except Exception:
            self._give_up(request)

    def service_actions(self) -> None:
        """Called after each look for connections, whether there was one or not."""
        self.turned_at = time.monotonic()

    def _wait_for_room(self, error: OSError) -> None:
        if not self._short:
            logger.error("no connection can be accepted", extra={"error": error.strerror})
        self._short = True
        self._stopping.wait(_SHORTAGE_PAUSE)

    def _take_in(self, request: socket.socket) -> None:
        """Count a connection and have it served, if its user may connect. Main thread at the end."""
        who = Credentials.of_peer(request)
        if not may_connect(self._live.current.access, who):
            why = f"user {who.uid} may not connect: [access] in the settings names who may"
            self._turn_away(request, who, why)
            return
        user = self._users.of(who.uid)
        try:
            check_room()  # its requests may need a thread
            charge = user.charge("connections")
            with self._lock:
                self._connections[request] = charge
                self._empty.clear()
            user.note_connection()
            client = ClientInfo(next(self._numbers), who, user)
            self._park(Connection(request, client, self._handlers, self._limits))
        except (LimitReached, OSError) as error:
            self._turn_away(request, who, str(error))
        except RuntimeError:
            self._turn_away(request, who, _NO_THREAD)

    def _turn_away(self, request: socket.socket, who: Credentials, why: str) -> None:
        logger.warning("connection refused", extra={"pid": who.pid, "uid": who.uid, "error": why})
        with contextlib.suppress(OSError):
            request.send(failure(why).message, socket.MSG_DONTWAIT)
        self.shutdown_request(request)

    # Any thread -------------------------------------------------------------------------------------------

    def _park(self, connection: Connection) -> None:
        """Have a connection wait for its client. Raises `OSError`; the connection has ended then."""
        try:
            self.parking.park(connection)
        except BaseException:
            connection.end("it cannot be watched")
            raise

    def _on_leave(self, connection: Connection) -> None:
        """A connection has ended, or needs a thread. Parking thread."""
        try:
            while connection.after is After.THREAD:
                try:
                    self._workers.start(
                        f"client {connection.client.number}", lambda: self._converse(connection)
                    )
                    return
                except RuntimeError:
                    connection.decline(_NO_THREAD)
            if connection.after is After.PARK:
                self._park(connection)
            else:
                self.shutdown_request(connection.sock)
        except Exception:  # there may not even be memory for the refusal
            self._give_up(connection.sock, connection.client)

    def _converse(self, connection: Connection) -> None:
        """Serve a connection in a worker's thread until its client is silent, or gone."""
        try:
            if connection.converse():
                self._park(connection)
            else:
                self._close(connection.sock)
        except Exception:
            self._give_up(connection.sock, connection.client)

    def _limits(self) -> Limits:
        return self._live.current.limits

    def is_free(self, timeout: float) -> bool:
        """Whether its lock can be had within `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout)
        if free:
            self._lock.release()
        return free

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, without waiting for what may take as long as its client likes."""
        if _may_take_long(request):
            with contextlib.suppress(RuntimeError):
                self._workers.start("close", lambda: self._close(request))
                return
        self._close(request)

    def _close(self, request: socket.socket) -> None:
        """Close a connection; if it was counted, it counts for as long as that takes."""
        try:
            close_stream(request)
        finally:
            with self._lock:
                charge = self._connections.pop(request, None)
                if not self._connections:
                    self._empty.set()
            if charge:
                charge.give_back()

    def _give_up(self, request: socket.socket, client: ClientInfo | None = None) -> None:
        """Close a connection because of an error that nobody expected."""
        try:
            self.handle_error(request, client)
        finally:  # to say so takes memory, of which there may be none
            self._close(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log an error that nobody expected; it costs this connection and nothing else."""
        client = client_address.number if isinstance(client_address, ClientInfo) else None
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
