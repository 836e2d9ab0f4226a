"""Accepts clients' connections, and has each of them served (docs/protocol.md, 1)."""

import contextlib
import errno
import itertools
import socket
import socketserver
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from cc_proxy.access import may_connect
from cc_proxy.continuity.keeper import NOTHING, Keeper
from cc_proxy.continuity.state.clients import ServerState
from cc_proxy.continuity.state.vms import RegistryState
from cc_proxy.linux.credentials import Credentials
from cc_proxy.linux.threads import check_room
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.connection import After, Connection
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers, failure
from cc_proxy.proxy.clients.listener import Listener
from cc_proxy.proxy.clients.parking import Parking
from cc_proxy.proxy.clients.roster import Roster, may_take_long
from cc_proxy.proxy.clients.status import About
from cc_proxy.proxy.clients.workers import Workers
from cc_proxy.proxy.rest import LOOK_UP, Rest
from cc_proxy.proxy.users import LimitReached
from cc_proxy.proxy.vms.registry import Registry
from cc_proxy.proxy.vms.vm import Vm
from cc_proxy.settings import LiveSettings

#: Seconds after which a thread that waits for the GIL asks for it. With CPython's default, 5 ms, each request
#: would take longer.
_SWITCH_INTERVAL = 0.001
#: Seconds within which the accept thread notices that it has to stop.
_STOP_POLL = 0.25
#: Seconds to wait after accept(2) has failed, mostly because no fd or memory is left.
_SHORTAGE_PAUSE = 0.1
#: Seconds after which a connection has to outlive the process. Most have gone by then.
_YOUNG = 1.0
_NO_THREAD = "the daemon cannot start another thread"


class Server(socketserver.ThreadingUnixStreamServer):
    """Accepts connections on the listening socket, and passes each between the parking and the workers.

    A silent connection is parked, because thousands of clients may be connected and few of them active. A
    request that may take long gets a thread of its own.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        listener: Listener,
        registry: Registry,
        live: LiveSettings,
        about: About | None = None,
        keeper: Keeper = NOTHING,
    ) -> None:
        # No request handler class is used: socketserver's live for one call only.
        unused = socketserver.BaseRequestHandler
        super().__init__(listener.socket.getsockname(), unused, bind_and_activate=False)
        self.socket.close()
        self.socket = listener.socket
        self._listener = listener
        self._live = live
        self._users = registry.users
        self._handlers = Handlers(registry, live, about, keeper)
        self._numbers = itertools.count(1)
        #: The connections that were accepted.
        self.roster = Roster()
        self._registry = registry
        self._rest = Rest()
        # Connections whose threads have come to rest. Any thread appends.
        self._resting: list[Connection] = []
        # Restored connections, until they are served. Main thread; after `start` the accept thread, and any
        # thread appends.
        self._restored: deque[Connection] = deque()
        # Connections that are not kept yet, and when they came. Any thread.
        self._young: deque[tuple[float, Connection]] = deque()
        self._workers = Workers()
        #: Where silent connections wait.
        self.parking: Parking[Connection] = Parking(self._on_leave)
        self._stopping = threading.Event()
        self._short = False
        self.turned_at = 0.0  #: When the accept thread last went round its loop (`time.monotonic`).
        self._thread = threading.Thread(target=self._accept_all, name="accept", daemon=True)

    # Main thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the accept thread and the parking thread."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._go_on()
        self.parking.start()
        self.turned_at = time.monotonic()
        self._thread.start()

    def stop_accepting(self) -> None:
        """Accept no more connections and read no more requests. Requests that have arrived are answered.

        Clients that wait to be accepted are served if the daemon made the socket, because nothing else would
        serve them. On an inherited socket they are left to the next process.
        """
        self._stopping.set()
        self.shutdown()
        self._thread.join()
        self._listener.remove()
        if self._listener.own:
            self._accept_waiting()
        self.socket.close()
        self.roster.shut_down(socket.SHUT_RD)

    def rest(self, timeout: float) -> bool:
        """Stop accepting, and have all threads come to rest; returns whether they did in `timeout` seconds.

        Clients that connect meanwhile wait in the socket's backlog. `hand_over` comes next.
        """
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self.shutdown()
        self._thread.join()
        self.parking.stop()
        self._rest.begin()
        self._workers.close()
        while True:
            self._registry.rest()  # again and again, since a hello may just have begun
            if self._workers.join(LOOK_UP):
                return True
            if time.monotonic() >= deadline:
                return False

    def hand_over(self) -> tuple[ServerState, RegistryState]:
        """Give up the connections, and the VMs with them, as values for `restore`. After `rest`."""
        connections = [*self.parking.parked, *self._resting, *self._restored]
        attached = [each.client.vm for each in connections if each.client.vm]
        vms, numbers = self._registry.hand_over(attached)
        state = ServerState(
            listener=self._listener.hand_over(),
            connections=[
                each.hand_over(numbers[each.client.vm] if each.client.vm else None) for each in connections
            ],
            next_number=next(self._numbers),
        )
        return state, vms

    def restore(self, state: ServerState, vms: Sequence[Vm]) -> None:
        """Go on with the previous process's connections; `vms` are the registry's. Call before `start`."""
        self._numbers = itertools.count(state.next_number)
        for each in state.connections:
            sock = socket.socket(fileno=each.fd.number)
            who = Credentials.of_peer(sock)
            user = self._users.of(who.uid)
            self.roster.add(sock, user.charge_again("connections"))
            client = ClientInfo(each.number, who, user, None if each.vm is None else vms[each.vm])
            connection = Connection(sock, client, self._handlers, self._live, self._rest)
            connection.restore(each)
            self._restored.append(connection)

    def _go_on(self) -> None:
        """Serve the connections that were restored."""
        for _ in range(len(self._restored)):
            connection = self._restored.popleft()
            if connection.after is After.PARK:
                self._park(connection)
            else:
                self._on_leave(connection)

    def server_close(self) -> None:
        """End the threads that are left. Call it last."""
        super().server_close()
        self.parking.close()
        self._workers.close()

    def _accept_waiting(self) -> None:
        """Accept the connections that wait, and no more: clients may still be connecting to this socket."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)
            while True:
                self.process_request(*self.socket.accept())

    # Accept thread ----------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        """Accept connections until the daemon stops, whatever happens."""
        # At least once, however early the daemon stops: `shutdown` waits for `serve_forever` to return.
        while True:
            try:
                self.serve_forever(_STOP_POLL)
            except Exception:
                faults.note("accepting connections failed")
                self._stopping.wait(_SHORTAGE_PAUSE)
            if self._stopping.is_set():
                return

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. If that fails, wait a little before the next try. Raises `OSError`."""
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
        """Count a connection, and park it until its client sends something."""
        try:
            self._take_in(request)
        except Exception:
            self._give_up(request)

    def service_actions(self) -> None:
        """Do what the accept thread does once a round; socketserver calls this."""
        self.turned_at = time.monotonic()
        self._go_on()
        if not self._young or self.turned_at - self._young[0][0] < _YOUNG + _STOP_POLL:
            return
        grown: list[Connection] = []  # many at once, because each call wakes the parking thread
        while self._young and self.turned_at - self._young[0][0] >= _YOUNG:
            grown.append(self._young.popleft()[1])
        if grown:
            self.parking.call(lambda: self._keep(grown))

    def _keep(self, connections: list[Connection]) -> None:
        """Keep connections that have lasted for a while. Parking thread."""
        for connection in connections:
            if self.parking.has(connection):
                connection.keep()
            elif connection.after is not After.END:  # it has a worker, which may keep it: look again later
                self._young.append((time.monotonic(), connection))

    def _wait_for_room(self, error: OSError) -> None:
        if not self._short:
            logger.error("no connection can be accepted", extra={"error": error.strerror})
        self._short = True
        self._stopping.wait(_SHORTAGE_PAUSE)

    def _take_in(self, request: socket.socket) -> None:
        """Park a connection, unless its user may not connect or a limit is reached.

        The accept thread calls this, or the main thread when the daemon stops.
        """
        who = Credentials.of_peer(request)
        if not may_connect(self._live.current.access, who):
            why = f"user {who.uid} may not connect: [access] in the settings names who may"
            self._turn_away(request, who, why)
            return
        user = self._users.of(who.uid)
        try:
            check_room()  # for the threads that its requests may need
            self.roster.add(request, user.charge("connections"))
            user.note_connection()
            client = ClientInfo(next(self._numbers), who, user)
            connection = Connection(request, client, self._handlers, self._live, self._rest)
            self._park(connection)
            self._young.append((time.monotonic(), connection))
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
        """Park a connection. Raises `OSError`; the connection has ended then."""
        try:
            self.parking.park(connection)
        except BaseException:
            connection.end("it cannot be watched")
            raise

    def _on_leave(self, connection: Connection) -> None:
        """A connection leaves the parking, or was restored: it has ended, or needs a thread."""
        try:
            while connection.after is After.THREAD:
                try:
                    self._workers.start(
                        f"client {connection.client.number}", lambda: self._converse(connection)
                    )
                    return
                except RuntimeError:
                    if connection.client.resumes:  # its request has begun, so it is not declined: try later
                        self._restored.append(connection)
                        return
                    connection.decline(_NO_THREAD)
            if connection.after is After.PARK:
                self._park(connection)
            else:
                self.shutdown_request(connection.sock)
        except Exception:  # not even the refusal could be made
            self._give_up(connection.sock, connection.client)

    def _converse(self, connection: Connection) -> None:
        """Serve a connection in a worker's thread until its client is silent or has gone."""
        try:
            if connection.converse():
                self._park(connection)
            elif connection.after is After.REST:
                self._resting.append(connection)
            else:
                self.roster.close(connection.sock)
        except Exception:
            self._give_up(connection.sock, connection.client)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, in another thread if its client can make that take long."""
        if may_take_long(request):
            with contextlib.suppress(RuntimeError):
                self._workers.start("close", lambda: self.roster.close(request))
                return
        self.roster.close(request)

    def _give_up(self, request: socket.socket, client: ClientInfo | None = None) -> None:
        """Close a connection after an unexpected error."""
        try:
            self.handle_error(request, client)
        finally:  # logging takes memory, and there may be none
            self.roster.close(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log an unexpected error. It ends this connection, and affects no other."""
        client = client_address.number if isinstance(client_address, ClientInfo) else None
        faults.note("connection failed", client=client)
