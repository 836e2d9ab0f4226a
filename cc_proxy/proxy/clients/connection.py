"""One client's connection: reads requests and sends responses in its thread (docs/protocol.md, 1)."""

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
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.fdpassing import TAG
from cc_proxy.api.messages import MessageParser
from cc_proxy.log.levels import logger
from cc_proxy.proxy.clients.handlers import Client, Reply, failure
from cc_proxy.proxy.spin import Eager
from cc_proxy.proxy.users import LimitReached

if TYPE_CHECKING:
    from cc_proxy.proxy.clients.server import Server

#: Seconds that a connection's own thread waits for the next request: one that has just sent one may soon send
#: another, and to be woken by `Idle` takes longer.
_BUSY = 0.02
#: Fits most requests and, as a bytes object, Python's own small blocks: thousands of threads wait with one.
_READ_SIZE = 448
_LARGEST_READ = 64 * 1024
#: Bytes of a request that need not be counted before they have arrived, and of a response before it has been
#: taken: more than those in the field have.
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


class Connection(socketserver.BaseRequestHandler):
    """One client's connection."""

    server: "Server"
    request: socket.socket
    #: What the server calls an address: clients' sockets have no names.
    client_address: Client

    def handle(self) -> None:
        """Answer requests, one after the other, until the client goes or breaks the protocol."""
        client = self.client_address
        self._share = client.share
        self._eager = Eager()
        # Bytes of the request that is arriving, or being answered, or of its response, if that is a long one.
        self._counted = 0
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
            if len(reply.message) > _UNCOUNTED:
                reply = self._count(reply)
            self._send(reply)
            # They do not count any more, and the client may be silent for as long as it likes.
            del text, reply
            if self._counted:
                self._count_no_more()

    def _count(self, reply: Reply) -> Reply:
        """Count a long response until it has been taken; returns the refusal that goes out in its place."""
        try:
            self._share.take("request_bytes", len(reply.message))
        except LimitReached as limit:
            size = len(reply.message)
            return failure(f"it was carried out, but its response of {size} bytes cannot be sent: {limit}")
        self._counted = len(reply.message)
        return reply

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
