"""One client's connection: passes requests to the handlers, and sends responses (docs/protocol.md, 1)."""

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable
from enum import Enum, auto

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.messages import MessageParser
from cc_proxy.api.transport import limit_receive, limit_send
from cc_proxy.linux.fds import Fd
from cc_proxy.log import faults
from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.handlers import ClientInfo, Handlers, Reply, failure
from cc_proxy.proxy.clients.kept import AT_PHASE, KeptConnection, Phase
from cc_proxy.proxy.clients.outgoing import Outgoing
from cc_proxy.proxy.clients.state import ConnectionState
from cc_proxy.proxy.rest import LOOK_UP, Rest, Resting
from cc_proxy.proxy.spin import Spin
from cc_proxy.proxy.users import Charge, LimitReached
from cc_proxy.settings import Limits

#: Milliseconds that a connection keeps its thread after a response. Clients often send one command after the
#: other, and a thread that waits for it has the next one sooner than the parking thread.
_LINGER = 20
#: Most requests fit into this, and a bytes object of this size fits into one of Python's small blocks.
_READ_SIZE = 448
_LARGEST_READ = 64 * 1024
#: Longer requests and responses count against `request_bytes` until they are done with. Those of clients in
#: the field are shorter.
_UNCOUNTED = 4 * 1024
#: A plain int, because converting the enum takes longer than the rest of a send.
_DONTWAIT = int(socket.MSG_DONTWAIT)


class After(Enum):
    """What becomes of a connection after it has been served."""

    PARK = auto()  # its client is silent
    THREAD = auto()  # what comes next may take time
    END = auto()
    REST = auto()  # another process goes on with it


class Connection:
    """Owner of one client's socket. One thread at a time: the parking thread, or a worker.

    While its client is silent the connection is parked. The parking thread answers what it can at once. When
    there is something to wait for - an agent, the rest of a message, a client that does not read - a worker
    takes over.
    """

    def __init__(
        self,
        sock: socket.socket,
        client: ClientInfo,
        handlers: Handlers,
        limits: Callable[[], Limits],
        rest: Rest,
    ) -> None:
        self.client = client
        #: What becomes of it next.
        self.after = After.PARK
        #: Its socket. The server closes it.
        self.sock = sock
        self._handlers = handlers
        self._limits = limits
        self._rest = rest
        self._deadline: float | None = None  # of the message, or the response, that is unfinished
        self._parser = MessageParser()
        self._spin = Spin()
        # What the parking thread leaves to a worker: a request, and the seconds to wait before answering it;
        # or the rest of a response.
        self._text: bytes | None = None
        self._delay = 0.0
        self._kept = KeptConnection(handlers.keeper, client)
        self._outgoing = Outgoing(sock, self._kept)
        self._charge: Charge | None = None  # for a long request or response
        client.is_here = self._is_here
        handlers.clients.add(client)
        logger.debug("client connected", extra=client.fields)

    def fileno(self) -> int:
        """The socket's fd."""
        return self.sock.fileno()

    def _is_here(self) -> bool:
        """Whether the client has not hung up. One that has only shut down its sending may still wait."""
        poll = select.poll()
        poll.register(self.sock, 0)
        return not poll.poll(0)

    # Between two processes --------------------------------------------------------------------------------

    def hand_over(self, vm: int | None) -> ConnectionState:
        """Give up everything as a value, for `restore`. `vm` says which one it is attached to."""
        unsent, passed = self._outgoing.hand_over()
        return ConnectionState(
            fd=Fd(self.sock.detach()),
            number=self.client.number,
            vm=vm,
            unread=self._parser.unread,
            text=self._text,
            delay=self._delay,
            unsent=unsent,
            passed=passed,
            left=None if self._deadline is None else self._deadline - time.monotonic(),
            counted=self._charge.number if self._charge else 0,
        )

    def restore(self, state: ConnectionState) -> None:
        """Go on where the process before stood; `after` says how. Before any thread serves it."""
        self._parser.receive_data(state.unread)
        self._text, self._delay = state.text, state.delay
        self.client.resumes = state.text is not None
        self._outgoing.restore(state.unsent, state.passed)
        self._deadline = None if state.left is None else time.monotonic() + state.left
        if state.counted:
            self._charge = self.client.user.charge_again("request_bytes", state.counted)
        begun = state.unread or not self._outgoing.is_sent() or state.text is not None
        self.after = After.THREAD if begun else After.PARK
        self._kept.begin(self.fileno(), Phase.BETWEEN if begun else Phase.SILENT)

    # Parking thread ---------------------------------------------------------------------------------------

    def on_readable(self) -> bool:
        """Answer what can be answered at once; returns whether the connection stays parked."""
        return self._go_on(self._serve_arrived)

    def keep(self) -> None:
        """It has been there for a while, and has to outlive the process, however that ends."""
        self._kept.begin(self.fileno(), Phase.SILENT)

    def _serve_arrived(self) -> After:
        data = self._receive()
        if not data:
            return After.PARK if data is None else After.END
        self._parser.receive_data(data)
        return self._answer_parsed()

    def _answer_parsed(self) -> After:
        parser, client = self._parser, self.client
        while (text := parser.next_text()) is not None:
            self._note_asked()
            self._delay = client.user.delay()
            reply = None if self._delay else self._handlers.answer_at_once(client, text)
            if reply is None:
                self._text = text
                return After.THREAD
            if reply.passed:
                self._kept.begin(self.fileno(), Phase.BETWEEN)
            if not self._begin_response(reply):
                return After.THREAD
        self._kept.cell[AT_PHASE] = Phase.BETWEEN if parser.unfinished else Phase.SILENT
        return After.THREAD if parser.unfinished else After.PARK

    def decline(self, why: str) -> None:
        """There is no thread: answer the request that needs one with an error, and go on with the next.

        What is no request, such as the beginning of a message, ends the connection.
        """
        self._go_on(lambda: self._decline(why))

    def _decline(self, why: str) -> After:
        is_request, self._text, self._delay = self._text is not None, None, 0.0
        logger.warning("no thread for a request", extra={**self.client.fields, "error": why})
        if not self._outgoing.is_sent() or not self._begin_response(failure(why)) or not is_request:
            return After.END
        return self._answer_parsed()

    # A worker's thread ------------------------------------------------------------------------------------

    def converse(self) -> bool:
        """Answer requests until the client is silent; returns whether to park the connection again."""
        return self._go_on(self._converse)

    def _converse(self) -> After:
        self._kept.begin(self.fileno(), Phase.BETWEEN)
        self._ready = select.poll()
        self._ready.register(self.sock, select.POLLIN)
        self._send_rest()
        if self._text is not None:
            self._answer(self._text)
        while not isinstance(text := self._next_text(), After):
            self._text = text
            self._delay = self.client.user.delay()
            self._answer(text)
            del text  # not to be kept while the client is silent
        return text

    def _answer(self, text: bytes) -> None:
        self._note_asked()
        if self._delay:
            self._delay = self._rest.sleep(self._delay)
        self._rest.check()
        reply = self._handlers.answer(self.client, text)
        self._text, self.client.resumes = None, False
        self._uncount()
        if len(reply.message) > _UNCOUNTED:
            reply = self._count(reply)
        if not self._begin_response(reply):
            self._send_rest()
        self._uncount()

    def _next_text(self) -> bytes | After:
        """Return the next request's text.

        Between messages a client may be silent for as long as it likes, but not in the middle of one.
        """
        parser = self._parser
        while (text := parser.next_text()) is None:
            if parser.unfinished:
                rest = self._finish_text()
                return After.END if rest is None else rest
            self._kept.cell[AT_PHASE] = Phase.SILENT
            data = self._spin.wait(self._receive, self._sleep)
            if not data:
                return After.PARK if data is None else After.END
            parser.receive_data(data)
        return text

    def _sleep(self) -> bytes | None:
        return self._receive() if self._ready.poll(_LINGER) else None

    def _finish_text(self) -> bytes | None:
        """Return the text of a message that has begun to arrive; None if the client closes in the middle."""
        parser = self._parser
        self._kept.cell[AT_PHASE] = Phase.BETWEEN
        deadline = self._begin_deadline()
        while (text := parser.next_text()) is None:
            missing = parser.missing
            if missing > _UNCOUNTED and self._charge is None:
                self._charge = self.client.user.charge("request_bytes", missing)
            data = self._receive_by(deadline, min(missing, _LARGEST_READ))
            if not data:
                return None
            parser.receive_data(data)
            if parser.missing:
                self._pace()
        self._deadline = None
        return text

    def _begin_deadline(self) -> float:
        """Return until when a message, or a response, has to be through, if it has just begun."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._limits().message_timeout
        return self._deadline

    def _pace(self) -> None:
        """Count a piece of a message like a request, and wait if the user has to.

        Otherwise a thousand clients that send byte by byte would wake a thousand threads, and keep the GIL
        from all others.
        """
        if delay := self.client.user.delay():
            self._rest.sleep(delay)
            self._rest.check()

    def _receive_by(self, deadline: float, size: int) -> bytes:
        try:
            while (left := deadline - time.monotonic()) > 0:
                self._rest.check()
                limit_receive(self.sock, min(left, LOOK_UP))
                with contextlib.suppress(BlockingIOError):
                    return self.sock.recv(size)
            # The rest may have come in time, while this process was stopped.
            return self.sock.recv(size, _DONTWAIT)
        except BlockingIOError:
            raise ProtocolError("a message that had begun did not arrive in time") from None

    def _refuse(self, why: str) -> None:
        """Say why a request is refused, and read the rest of it.

        A client that still writes when its connection is closed gets an error for that, and never reads why.
        """
        self._deadline = None
        deadline = self._begin_deadline()
        rest = self._parser.missing
        try:
            if not self._outgoing.begin(failure(why)):
                self._send_rest()
            self.sock.shutdown(socket.SHUT_WR)
            while rest and (data := self._receive_by(deadline, min(rest, _LARGEST_READ))):
                rest -= len(data)
                self._pace()
        except (OSError, ProtocolError, Resting):
            pass  # the client has gone, or takes too long

    def _send_rest(self) -> None:
        """Send the rest of a response. Raises `OSError` if the client does not read it in time."""
        if self._outgoing.is_sent():
            return
        deadline = self._begin_deadline()
        while not self._outgoing.is_sent() and (left := deadline - time.monotonic()) > 0:
            self._rest.check()
            limit_send(self.sock, min(left, LOOK_UP))
            self._outgoing.go_on()
        if not self._outgoing.is_sent():
            raise TimeoutError(errno.ETIMEDOUT, "a response was not taken in time")
        self._deadline = None

    def _receive(self) -> bytes | None:
        self._kept.cell[AT_PHASE] = Phase.READING
        try:
            return self.sock.recv(_READ_SIZE, _DONTWAIT)
        except BlockingIOError:
            self._kept.cell[AT_PHASE] = Phase.SILENT
            return None

    def _note_asked(self) -> None:
        """A request has been taken from what was read."""
        self._kept.cell[AT_PHASE] = Phase.BETWEEN if self._parser.unfinished else Phase.ASKED

    def _begin_response(self, reply: Reply) -> bool:
        """Send as much of a response as fits now; returns whether that was all. Raises `OSError`."""
        self._kept.note_vm()
        return self._outgoing.begin(reply)

    # Either -----------------------------------------------------------------------------------------------

    def _go_on(self, step: Callable[[], After]) -> bool:
        """Run a step, which returns what comes next; returns whether that is to be parked.

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
        """Give back everything except the socket, which the server closes. For the thread that serves it."""
        self.after = After.END
        self._uncount()
        self._outgoing.close()
        self._kept.end()
        self._handlers.clients.discard(self.client)
        self.client.is_here = _gone  # breaks the cycle of references between the two
        logger.debug("client disconnected", extra={"client": self.client.number, "reason": reason})

    def _count(self, reply: Reply) -> Reply:
        """Count a long response until it has been read. Returns it, or the refusal to send in its place."""
        size = len(reply.message)
        try:
            self._charge = self.client.user.charge("request_bytes", size)
        except LimitReached as limit:
            return failure(f"it was carried out, but its response of {size} bytes cannot be sent: {limit}")
        return reply

    def _uncount(self) -> None:
        if self._charge:
            self._charge.give_back()
            self._charge = None


def _gone() -> bool:
    return False
