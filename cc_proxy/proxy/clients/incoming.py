"""Reading one client's requests."""

import contextlib
import select
import socket

from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.messages import MessageParser
from cc_proxy.api.transport import LARGEST_READ
from cc_proxy.continuity.cells import AT_PHASE, Phase
from cc_proxy.proxy.clients.kept import KeptConnection
from cc_proxy.proxy.clients.unfinished import UNCOUNTED, Unfinished
from cc_proxy.proxy.rest import Rest
from cc_proxy.proxy.spin import Spin
from cc_proxy.proxy.users import User

#: Milliseconds that a connection keeps its thread after a response. Clients often send one command after
#: another, and a thread that waits gets the next one sooner than the parking thread.
_LINGER = 20
#: A plain int, because converting the enum takes longer than the rest of a call.
_PEEK = int(socket.MSG_PEEK)


class ClientGone(Exception):
    """The client sends no more."""


class Incoming:
    """Reads requests from a non-blocking socket. One thread at a time."""

    def __init__(
        self, sock: socket.socket, kept: KeptConnection, unfinished: Unfinished, user: User, rest: Rest
    ) -> None:
        self._sock = sock
        self._kept = kept
        self._unfinished = unfinished
        self._user = user
        self._rest = rest
        self._parser = MessageParser()
        self._spin = Spin()

    @property
    def unread(self) -> bytes:
        """Bytes that have come, of requests that have not been taken."""
        return self._parser.unread

    def restore(self, unread: bytes) -> None:
        """Go on after the bytes that had come in the previous process."""
        self._parser.receive_data(unread)

    # Without waiting --------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Read what epoll has announced; returns whether anything came. Raises `ClientGone`."""
        data = self._read()
        if data is None:
            return False
        self._take(data)
        return True

    def next_arrived(self) -> bytes | None:
        """Return the text of the next request that has come whole, if any has. Raises `ProtocolError`."""
        text = self._parser.next_text()
        if text is None:
            self._kept.cell[AT_PHASE] = Phase.BETWEEN if self._parser.unfinished else Phase.SILENT
        else:
            self.note_asked()
        return text

    @property
    def has_begun(self) -> bool:
        """Whether a part of a message has come."""
        return self._parser.unfinished

    def note_asked(self) -> None:
        """Note that a request has been taken, and waits for its answer."""
        self._kept.cell[AT_PHASE] = Phase.BETWEEN if self._parser.unfinished else Phase.ASKED

    def _take(self, data: bytes) -> None:
        if not data:
            raise ClientGone
        self._parser.receive_data(data)

    def _look(self) -> bytes | None:
        """Read what is there, if anything. Peek first, because nothing has announced it."""
        try:
            if not self._sock.recv(1, _PEEK):
                return b""
        except BlockingIOError:
            return None
        return self._read()

    def _read(self) -> bytes | None:
        """Read what was announced. If the process is killed and those bytes are gone, they had been read."""
        self._kept.cell[AT_PHASE] = Phase.READING
        try:
            return self._sock.recv(UNCOUNTED)
        except BlockingIOError:  # it was urgent data, which recv(2) has thrown away
            self._kept.cell[AT_PHASE] = Phase.SILENT
            return None

    # Waiting ----------------------------------------------------------------------------------------------

    def next(self) -> bytes | None:
        """Return the next request's text, or None if the client is silent.

        Between messages a client may be silent for as long as it likes, but not in the middle of one. Raises
        `ClientGone`, `ProtocolError`, `LimitReached`, `OSError` or `Resting`.
        """
        parser = self._parser
        while (text := parser.next_text()) is None:
            if parser.unfinished:
                return self._finish()
            self._kept.cell[AT_PHASE] = Phase.SILENT
            data = self._spin.wait(self._look, self._sleep)
            if data is None:
                return None
            self._take(data)
        return text

    def _sleep(self) -> bytes | None:
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        return self._read() if ready.poll(_LINGER) else None

    def _finish(self) -> bytes:
        """Return the text of a message that has begun to arrive."""
        parser = self._parser
        self._kept.cell[AT_PHASE] = Phase.BETWEEN
        deadline = self._unfinished.begin()
        while (text := parser.next_text()) is None:
            missing = parser.missing
            if missing > UNCOUNTED:
                self._unfinished.count(missing)
            self._take(self._receive_by(deadline, missing))
            if parser.missing:
                self._pace()
        self._unfinished.end()
        return text

    def drop_rest(self) -> None:
        """Read the rest of a message, and forget it. Raises what `next` raises."""
        deadline, rest = self._unfinished.begin(), self._parser.missing
        while rest and (data := self._receive_by(deadline, rest)):
            rest -= len(data)
            self._pace()

    def _receive_by(self, deadline: float, most: int) -> bytes:
        while True:
            in_time = self._rest.wait_for(self._sock, select.POLLIN, deadline)
            # Even after the deadline: it may have come in time, while this process was stopped.
            with contextlib.suppress(BlockingIOError):
                return self._sock.recv(min(most, LARGEST_READ))
            if not in_time:
                raise ProtocolError("a message that had begun did not arrive in time")

    def _pace(self) -> None:
        """Count a piece of a message as a request, and wait if its user has to.

        Otherwise a thousand clients that send byte by byte would wake a thousand threads, which would keep
        the GIL from all others.
        """
        if delay := self._user.delay():
            self._rest.sleep(delay)
            self._rest.check()
