"""Sending one response, and the fd that follows it."""

import array
import socket

from cc_proxy.api.fdpassing import TAG
from cc_proxy.api.messages import HEADER, MAX_RESPONSE
from cc_proxy.continuity.cells import AT_PHASE, Phase
from cc_proxy.linux.fds import Fd, is_for_now
from cc_proxy.linux.receipt import Receipt
from cc_proxy.proxy.clients.handlers import Reply
from cc_proxy.proxy.clients.kept import KeptConnection

#: Only a response to `status` can be longer. The kernel takes this many bytes whole, or none of them.
_USUAL = HEADER.size + MAX_RESPONSE


class Outgoing:
    """What is left to send of a response. Owns the socket whose fd is passed. One thread at a time."""

    def __init__(self, sock: socket.socket, kept: KeptConnection) -> None:
        self._sock = sock
        self._kept = kept
        self._unsent: bytes | memoryview = b""
        self._passed: socket.socket | None = None

    def is_sent(self) -> bool:
        """Whether nothing is left."""
        return not self._unsent and not self._passed

    def begin(self, reply: Reply) -> bool:
        """Send as much of a reply as fits now; returns whether that was all. Raises `OSError`."""
        self._unsent, self._passed = reply
        receipt = self._kept.receipt
        if receipt and len(reply.message) <= _USUAL:
            return self._send_at_once(receipt, reply.message)
        return self.go_on()

    def go_on(self) -> bool:
        """Send as much as fits now; returns whether nothing is left. Raises `OSError`."""
        self._kept.cell[AT_PHASE] = Phase.BETWEEN
        try:
            while rest := self._unsent:
                sent = self._sock.send(rest)
                self._unsent = memoryview(rest)[sent:] if sent < len(rest) else b""
            if self._passed:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._passed.fileno()]))]
                self._sock.sendmsg([TAG], rights)
                self.close()
        except OSError as error:
            if not is_for_now(error):
                raise
            return False
        return True

    def close(self) -> None:
        """Close the socket whose fd was to be passed."""
        passed, self._passed = self._passed, None
        if passed:
            passed.close()

    def hand_over(self) -> tuple[bytes, Fd | None]:
        """Give up what is left as a value, for `restore`."""
        return bytes(self._unsent), Fd(self._passed.detach()) if self._passed else None

    def restore(self, unsent: bytes, passed: Fd | None) -> None:
        """Go on where the previous process stood."""
        self._unsent = unsent
        self._passed = socket.socket(fileno=passed.number) if passed else None

    def _send_at_once(self, receipt: Receipt, message: bytes) -> bool:
        """Send a short response. If this process is killed meanwhile, the receipt says whether it was sent.

        Not if more was read after its request: then the next process hangs up.
        """
        cell, fd = self._kept.cell, self._sock.fileno()
        if cell[AT_PHASE] == Phase.ASKED:
            receipt.clear()
            cell[AT_PHASE] = Phase.PASSING if self._passed else Phase.SENDING
        try:
            receipt.send(fd, message)
            self._unsent = b""
            if self._passed:
                receipt.send_fd(fd, TAG, self._passed.fileno())
                self.close()
        except OSError as error:
            cell[AT_PHASE] = Phase.BETWEEN
            if not is_for_now(error):
                raise
            return False
        return True
