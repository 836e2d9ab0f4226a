"""The clients' side: accepts connections and serves each in a thread of its own (docs/protocol.md, 1)."""

import array
import contextlib
import errno
import functools
import itertools
import math
import os
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cc_proxy import faults
from cc_proxy.access import may_connect
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.fdpassing import TAG
from cc_proxy.api.messages import MessageParser
from cc_proxy.credentials import Credentials
from cc_proxy.fds import close_stream, may_hold_fds
from cc_proxy.log import logger
from cc_proxy.proxy.crew import Crew
from cc_proxy.proxy.eager import Eager
from cc_proxy.proxy.handlers import Client, Handlers, Reply, failure
from cc_proxy.proxy.idle import Idle
from cc_proxy.proxy.listener import Listener
from cc_proxy.proxy.registry import Registry
from cc_proxy.proxy.shares import LimitReached, Share
from cc_proxy.proxy.status import About
from cc_proxy.settings import Limits, LiveSettings
from cc_proxy.threads import start_thread

#: Threads that wait for the interpreter ask for it this often, in seconds.
_SWITCH_INTERVAL = 0.001
#: Seconds that a connection's own thread waits for the next request: one that has just sent one may soon send
#: another, and to be woken by `Idle` takes longer.
_BUSY = 0.02
#: Seconds that the accept thread leaves to others after a connection that came too early. More come, and to
#: accept them as fast as it can is to hold the interpreter, which a thread that is quick gets back each time.
_BREATH = 0.000_1
#: Seconds until the accept thread notices that it is to stop.
_STOP_POLL = 0.25
#: What accept(2) says when there is no room for another connection, and how long to wait then, in seconds.
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SHORTAGE_PAUSE = 0.1

#: Fits most requests and, as a bytes object, Python's own small blocks: thousands of threads wait with one.
_READ_SIZE = 448
_LARGEST_READ = 64 * 1024
#: Bytes of a request that need not be counted before they have arrived: more than those in the field have.
_UNCOUNTED = 4 * 1024
#: Messages in the field come in so many pieces at the most, a header and a text; of others' it is a while, in
#: seconds, until the next piece is looked for.
_PIECES = 2
_PATIENCE = 0.005
#: Such a look is as much work as so many requests.
_LOOKING = 3
#: Who breaks the protocol will have to come again, and that is taken for as much work as so many requests.
_BREAKING = 3
#: What the kernel takes in one piece.
_LARGEST_SEND = 32 * 1024
#: A plain number: this is passed with each response.
_DONTWAIT = int(socket.MSG_DONTWAIT)
_TIMEVAL = struct.Struct("@ll")


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
        self._crew = Crew()
        self.shares = registry.shares
        self._stopping = threading.Event()
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

        Who has connected to a socket of our own is not left to wait for nobody; who has connected to an
        inherited one will be served by our successor.
        """
        self._stopping.set()
        self.shutdown()
        self._thread.join()
        self._listener.remove()
        if self._listener.own:
            self._accept_waiting()
        self.socket.close()
        self.idle.call_all()
        self._crew.close()
        self._shut_down_connections(socket.SHUT_RD)

    def join_connections(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the connections to end, then close the others.

        Returns whether all had ended.
        """
        self._crew.join(timeout)
        return not self._shut_down_connections(socket.SHUT_RDWR)

    def server_close(self) -> None:
        """Give back what is left when everybody has gone, or had the time to."""
        super().server_close()
        self.idle.close()

    def _accept_waiting(self) -> None:
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                self.process_request(*self.socket.accept())

    def _shut_down_connections(self, how: int) -> int:
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(how)
            return len(self._connections)

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
            if error.errno in _SHORTAGES:
                self._wait_for_room(error)
            raise
        self._short = False
        return request

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Have a connection served in a thread of its own, if whoever made it may connect."""
        who = Credentials.of_peer(request)
        if not may_connect(self._live.current.access, who):
            self._turn_away(
                request, who, f"user {who.uid} may not connect: [access] in the settings names who may"
            )
            return
        share = self.shares.of(who.uid)
        try:
            self._admit(share)
        except (LimitReached, OSError) as error:
            self._turn_away(request, who, str(error))
            return
        client = Client(next(self._numbers), who, share)
        with self._lock:
            self._connections[request] = share
        wait = share.arrive()
        if wait:
            self.idle.call_later(wait, lambda: self._hand_over_late(request, client))
            time.sleep(_BREATH)
        else:
            self._hand_over(request, client)

    def _hand_over_late(self, request: socket.socket, client: Client) -> None:
        """Do it for one that came too fast. The thread that wakes, or at the end the main thread."""
        try:
            self._hand_over(request, client)
        except Exception:  # for the accept thread `socketserver` does this
            self.handle_error(request, client)
            self.shutdown_request(request)

    def _hand_over(self, request: socket.socket, client: Client) -> None:
        """Have a connection served in a thread of its own."""
        try:
            self._crew.hand_over(f"client {client.number}", lambda: self._serve(request, client))
        except RuntimeError:
            self._turn_away(request, client.who, "the daemon cannot start another thread")

    def _admit(self, share: Share) -> None:
        """Count a connection of a user's. Raises `LimitReached` or `OSError`."""
        share.take("connections")
        try:
            self.idle.admit(share.uid)
        except BaseException:
            share.give_back("connections")
            raise

    def service_actions(self) -> None:
        """Called after each look for connections, whether there was one or not."""
        self.turned_at = time.monotonic()

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
        if not may_hold_fds(request) or not _begin(close):
            close()

    def _close(self, request: socket.socket) -> None:
        """Close a connection; if it was admitted, it counts for as long as that takes."""
        with self._lock:
            share = self._connections.pop(request, None)
        close_stream(request)
        if share:
            self.idle.dismiss(share.uid)
            share.give_back("connections")

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log an error that nobody expected; it costs this connection and nothing else."""
        client = client_address.number if isinstance(client_address, Client) else None
        faults.note("connection failed", client=client)


def _begin(function: Callable[[], None]) -> bool:
    """Call a function in a thread of its own, if there is one to be had."""
    try:
        start_thread(threading.Thread(target=function, name="farewell", daemon=True))
    except RuntimeError:
        return False
    return True


class Connection(socketserver.BaseRequestHandler):
    """One client's connection, in its own thread."""

    server: Server
    request: socket.socket
    #: What the server calls an address: clients' sockets have no names.
    client_address: Client

    def handle(self) -> None:
        """Answer requests, one after the other, until the client goes or breaks the protocol."""
        client = self.client_address
        self._share = client.share
        self._eager = Eager()
        self._counted = 0  # bytes of the request that is arriving, or being answered, if that is a long one
        fields = {"client": client.number, "pid": client.who.pid, "uid": client.who.uid}
        logger.debug("client connected", extra=fields)
        reason = "closed by the client"
        self.server.handlers.clients.add(client)
        try:
            self._set_timeout(socket.SO_RCVTIMEO, _BUSY)
            self._serve(client)
        except ProtocolError as error:
            reason = str(error)
            logger.warning("client broke the protocol", extra={**fields, "error": reason[:200]})
            with client.share.turn:
                client.share.pace(_BREAKING)
        except LimitReached as limit:
            reason = str(limit)
            self._refuse(reason)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        finally:
            self._count_no_more()
            self.server.handlers.clients.discard(client)
        logger.debug("client disconnected", extra={"client": client.number, "reason": reason})

    def _refuse(self, why: str) -> None:
        """Say why a request is not let in, and throw away the rest of it.

        Who still writes when a connection is closed is told of that, and never reads why.
        """
        deadline = time.monotonic() + self.server.limits.message_timeout
        with contextlib.suppress(OSError, ProtocolError):
            self._send(failure(why))
            self.request.shutdown(socket.SHUT_WR)
            while self._receive_by(deadline, _LARGEST_READ) and time.monotonic() < deadline:
                self._let_more_come()

    def _serve(self, client: Client) -> None:
        parser = MessageParser()
        while (text := self._next_text(parser)) is not None:
            reply = self.server.handlers.answer(client, text)
            if self._counted:
                self._count_no_more()
            self._send(reply)

    def _next_text(self, parser: MessageParser) -> bytes | None:
        """Return the next request's text; None once the client has closed the connection.

        Between messages a client may be silent for as long as it likes, but not in the middle of one.
        """
        while (text := parser.next_text()) is None:
            if parser.unfinished:
                return self._finish_text(parser)
            # Who asks one thing after the other is not to wait longer for each than it takes.
            data = self._sleep() if self._share.others else self._eager.wait(self._look, self._sleep)
            if not data:
                return None
            parser.receive_data(data)
        return text

    def _look(self) -> bytes | None:
        try:
            return self.request.recv(_READ_SIZE, _DONTWAIT)
        except BlockingIOError:
            return None

    def _sleep(self) -> bytes:
        try:
            return self.request.recv(_READ_SIZE)
        except BlockingIOError:
            return self._receive_by(math.inf, _READ_SIZE)

    def _finish_text(self, parser: MessageParser) -> bytes | None:
        """Return the text of a message of which a part has arrived; None if the client closes before."""
        deadline = time.monotonic() + self.server.limits.message_timeout
        for pieces in itertools.count():
            if (text := parser.next_text()) is not None:
                break
            if pieces >= _PIECES:
                self._let_more_come()
            missing = parser.missing
            if missing > _UNCOUNTED and not self._counted:
                self._share.take("request_bytes", missing)
                self._counted = missing
            data = self._receive_by(deadline, min(missing, _LARGEST_READ))
            if not data:
                return None
            parser.receive_data(data)
        return text

    def _let_more_come(self) -> None:
        """Read who sends a little at a time less often: each look takes the interpreter from others."""
        with self._share.turn:
            self._share.pace(_LOOKING)
        time.sleep(_PATIENCE)

    def _receive_by(self, deadline: float, size: int) -> bytes:
        while (seconds := deadline - time.monotonic()) > 0:
            with contextlib.suppress(BlockingIOError):
                return self.request.recv(size)
            self.server.idle.wait(self._share.uid, self.request, None if seconds == math.inf else seconds)
        # If this process was stopped, it came in time all the same.
        with contextlib.suppress(BlockingIOError):
            return self.request.recv(size, socket.MSG_DONTWAIT)
        raise ProtocolError("a message that had begun did not arrive in time")

    def _count_no_more(self) -> None:
        self._share.give_back("request_bytes", self._counted)
        self._counted = 0

    def _send(self, reply: Reply) -> None:
        if reply.passed is None:
            self._send_all(reply.message)
            return
        with reply.passed as passed:
            self._send_all(reply.message)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed.fileno()]))]
            self._send_by(self._send_deadline(), lambda flags: self.request.sendmsg([TAG], rights, flags))

    def _send_all(self, message: bytes) -> None:
        """Send a message whole. Raises `OSError` if it is not taken in time, a little at a time or not."""
        try:
            sent = self.request.send(message, _DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(message):
            self._send_rest(memoryview(message)[sent:])

    def _send_rest(self, rest: memoryview) -> None:
        deadline = self._send_deadline()
        while rest:
            # The kernel waits anew for each piece that it makes of what it is given.
            send = functools.partial(self.request.send, rest[:_LARGEST_SEND])
            rest = rest[self._send_by(deadline, send) :]

    def _send_deadline(self) -> float:
        return time.monotonic() + self.server.limits.message_timeout

    def _send_by(self, deadline: float, send: Callable[[int], int]) -> int:
        seconds = deadline - time.monotonic()
        with contextlib.suppress(BlockingIOError):
            if seconds > 0:
                self._set_timeout(socket.SO_SNDTIMEO, seconds)
                return send(0)
            return send(socket.MSG_DONTWAIT)
        raise TimeoutError(errno.ETIMEDOUT, "a response was not taken in time")

    def _set_timeout(self, option: int, seconds: float) -> None:
        # Rounded up, because 0 is for ever.
        whole, micro = divmod(math.ceil(seconds * 1_000_000), 1_000_000)
        self.request.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, micro))
