"""One client's connection: passes requests to the handlers, and sends responses (docs/protocol.md, 1)."""

import errno
import functools
import os
import select
import socket
from collections.abc import Callable
from enum import Enum, auto

from cc_proxy.api.errors import ProtocolError
from cc_proxy.continuity.cells import Phase
from cc_proxy.continuity.state.clients import ConnectionState
from cc_proxy.linux.fds import Fd
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers, Reply, failure
from cc_proxy.proxy.clients.incoming import ClientGone, Incoming
from cc_proxy.proxy.clients.kept import KeptConnection
from cc_proxy.proxy.clients.outgoing import Outgoing
from cc_proxy.proxy.clients.unfinished import UNCOUNTED, Unfinished
from cc_proxy.proxy.rest import Rest, Resting
from cc_proxy.proxy.users import LimitReached
from cc_proxy.settings import LiveSettings


class After(Enum):
    """What happens to a connection after it has been served."""

    PARK = auto()  # its client is silent
    THREAD = auto()  # the next step may take time
    END = auto()
    REST = auto()  # another process goes on with it


class Connection:
    """One client's connection. One thread at a time: the parking thread, or a worker.

    While its client is silent, the connection is parked. The parking thread answers what it can at once. A
    worker takes over when there is something to wait for: an agent, the rest of a message, or a client that
    does not read.
    """

    def __init__(
        self,
        sock: socket.socket,
        client: ClientInfo,
        handlers: Handlers,
        live: LiveSettings,
        rest: Rest,
    ) -> None:
        self.client = client
        #: What happens to it next.
        self.after = After.PARK
        #: Its socket. The server closes it.
        self.sock = sock
        sock.setblocking(False)
        self._handlers = handlers
        self._rest = rest
        # What the parking thread leaves to a worker: a request, and the seconds to wait before answering it.
        self._text: bytes | None = None
        self._delay = 0.0
        self._kept = KeptConnection(handlers.keeper, client)
        self._unfinished = Unfinished(client.user, live)
        self._incoming = Incoming(sock, self._kept, self._unfinished, client.user, rest)
        self._outgoing = Outgoing(sock, self._kept)
        client.is_here = functools.partial(_is_connected, sock)
        handlers.clients.add(client)
        logger.debug("client connected", extra=client.fields)

    def fileno(self) -> int:
        """The socket's fd."""
        return self.sock.fileno()

    # Between two processes --------------------------------------------------------------------------------

    def hand_over(self, vm: int | None) -> ConnectionState:
        """Give up everything as a value, for `restore`. `vm` is the number of the VM it is attached to."""
        unsent, passed = self._outgoing.hand_over()
        left, counted = self._unfinished.hand_over()
        return ConnectionState(
            fd=Fd(self.sock.detach()),
            number=self.client.number,
            vm=vm,
            unread=self._incoming.unread,
            text=self._text,
            delay=self._delay,
            unsent=unsent,
            passed=passed,
            left=left,
            counted=counted,
        )

    def restore(self, state: ConnectionState) -> None:
        """Go on where the previous process stood; `after` says how. Call it before any thread serves it."""
        self._incoming.restore(state.unread)
        self._text, self._delay = state.text, state.delay
        self.client.resumes = state.text is not None
        self._outgoing.restore(state.unsent, state.passed)
        self._unfinished.restore(state.left, state.counted)
        begun = state.unread or not self._outgoing.is_sent() or state.text is not None
        self.after = After.THREAD if begun else After.PARK
        self._kept.begin(self.fileno(), Phase.BETWEEN if begun else Phase.SILENT)

    # Parking thread ---------------------------------------------------------------------------------------

    def on_readable(self) -> bool:
        """Answer what can be answered at once; returns whether the connection stays parked."""
        return self._go_on(self._serve_arrived)

    def keep(self) -> None:
        """Keep the connection, so that it outlives this process however that ends."""
        self._kept.begin(self.fileno(), Phase.SILENT)

    def _serve_arrived(self) -> After:
        return self._answer_arrived() if self._incoming.receive() else After.PARK

    def _answer_arrived(self) -> After:
        client = self.client
        while (text := self._incoming.next_arrived()) is not None:
            self._delay = client.user.delay()
            reply = None if self._delay else self._handlers.answer_at_once(client, text)
            if reply is None:
                self._text = text
                return After.THREAD
            if reply.passed:
                self._kept.begin(self.fileno(), Phase.BETWEEN)
            if not self._begin_response(reply):
                return After.THREAD
        return After.THREAD if self._incoming.has_begun else After.PARK

    def decline(self, why: str) -> None:
        """No thread can be started: answer the request that needs one with an error, and go on.

        If it was needed for anything else, such as the rest of a message, the connection ends.
        """
        self._go_on(lambda: self._decline(why))

    def _decline(self, why: str) -> After:
        is_request, self._text, self._delay = self._text is not None, None, 0.0
        logger.warning("no thread for a request", extra={**self.client.fields, "error": why})
        if not self._outgoing.is_sent() or not self._begin_response(failure(why)) or not is_request:
            return After.END
        return self._answer_arrived()

    # A worker's thread ------------------------------------------------------------------------------------

    def converse(self) -> bool:
        """Answer requests until the client is silent; returns whether to park the connection again."""
        return self._go_on(self._converse)

    def _converse(self) -> After:
        self._kept.begin(self.fileno(), Phase.BETWEEN)
        self._send_rest()
        if self._text is not None:
            self._answer(self._text)
        while (text := self._incoming.next()) is not None:
            self._text = text
            self._delay = self.client.user.delay()
            self._answer(text)
            del text  # or it would stay in memory while the client is silent
        return After.PARK

    def _answer(self, text: bytes) -> None:
        self._incoming.note_asked()
        if self._delay:
            self._delay = self._rest.sleep(self._delay)
        self._rest.check()
        reply = self._handlers.answer(self.client, text)
        self._text, self.client.resumes = None, False
        self._unfinished.uncount()
        if len(reply.message) > UNCOUNTED:
            reply = self._count(reply)
        if not self._begin_response(reply):
            self._send_rest()
        self._unfinished.uncount()

    def _refuse(self, why: str) -> None:
        """Say why a request is refused, and read the rest of it.

        A client that is still writing when its connection is closed gets an error, and never reads why.
        """
        self._unfinished.begin(anew=True)
        try:
            if not self._outgoing.begin(failure(why)):
                self._send_rest()
            self.sock.shutdown(socket.SHUT_WR)
            self._incoming.drop_rest()
        except (OSError, ProtocolError, Resting):
            pass  # the client has gone, or takes too long

    def _send_rest(self) -> None:
        """Send the rest of a response. Raises `OSError` if the client does not read it in time."""
        if self._outgoing.is_sent():
            return
        deadline, in_time = self._unfinished.begin(), True
        while not self._outgoing.go_on():
            if not in_time:
                raise TimeoutError(errno.ETIMEDOUT, "a response was not taken in time")
            in_time = self._rest.wait_for(self.sock, select.POLLOUT, deadline)
        self._unfinished.end()

    def _begin_response(self, reply: Reply) -> bool:
        """Send as much of a response as fits now; returns whether that was all. Raises `OSError`."""
        self._kept.note_vm()
        return self._outgoing.begin(reply)

    # Either -----------------------------------------------------------------------------------------------

    def _go_on(self, step: Callable[[], After]) -> bool:
        """Run a step, which returns what comes next; returns whether that is parking.

        An error, or the client, may end the connection.
        """
        reason = "closed by the client"
        try:
            self.after = step()
            if self.after is not After.END:
                return self.after is After.PARK
        except Resting:
            self.after = After.REST
            return False
        except ClientGone:
            pass
        except ProtocolError as error:
            reason = str(error)
            logger.warning("client broke the protocol", extra={**self.client.fields, "error": reason[:200]})
        except LimitReached as limit:
            reason = str(limit)
            self._refuse(reason)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        except Exception:
            reason = "internal error"
            faults.note("connection failed", client=self.client.number)
        self.end(reason)
        return False

    def end(self, reason: str) -> None:
        """Give back all but the socket, which the server closes. Only the serving thread calls this."""
        self.after = After.END
        self._unfinished.uncount()
        self._outgoing.close()
        self._kept.end()
        self._handlers.clients.discard(self.client)
        logger.debug("client disconnected", extra={"client": self.client.number, "reason": reason})

    def _count(self, reply: Reply) -> Reply:
        """Count a long response until it has been read. Returns it, or a refusal to send instead."""
        size = len(reply.message)
        try:
            self._unfinished.count(size)
        except LimitReached as limit:
            return failure(f"it was carried out, but its response of {size} bytes cannot be sent: {limit}")
        return reply


def _is_connected(sock: socket.socket) -> bool:
    """Whether the peer has not hung up. One that has only shut down its sending may still wait."""
    poll = select.poll()
    poll.register(sock, 0)
    return not poll.poll(0)
