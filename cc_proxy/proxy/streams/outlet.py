"""Sending frames to a client, or to the VM."""

import socket
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from cc_proxy.continuity.cells import Cell
from cc_proxy.hyperstart.splitter import whole_frames
from cc_proxy.linux.fds import IOV_MAX, Piece, cut, is_for_now, send_pieces, taken_whole, untaken


class Outlet:
    """Sends frames to one peer, which has whole frames wherever this process is killed.

    Each send is of whole frames, and the kernel takes all of it or nothing: because it is short, or because
    there is room for it. What cannot be sent like that is sent in arbitrary pieces, and meanwhile the peer is
    *torn*: its cell says that it may have a part of a frame.

    One thread.
    """

    def __init__(self, sock: socket.socket, cell: Cell, word: int) -> None:
        """Send on a non-blocking socket, which stays the caller's. `cell[word]` says whether it is torn."""
        self._sock = sock
        self._cell = cell
        self._word = word
        self._most = taken_whole(sock)
        self._capacity = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._at_once = self._most  # bytes to send without asking for room; -1 while the peer is torn

    def tear(self) -> None:
        """Note that frames are about to be sent in arbitrary pieces."""
        self._cell[self._word], self._at_once = True, -1

    def mend(self) -> None:
        """Note that everything has been sent, so that the peer has whole frames again."""
        if self._at_once < 0:
            self._cell[self._word], self._at_once = False, self._most

    def send(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Send pieces in order; returns what the socket did not take. Each piece is of whole frames.

        Once the peer is torn, it stays so until everything is sent. Raises `OSError` if it has gone.
        """
        one = len(pieces) == 1
        size = len(pieces[0]) if one else sum(map(len, pieces))
        if size > self._at_once or len(pieces) > IOV_MAX:
            if self._at_once < 0:
                return self._send_torn(pieces)
            if size > self._room() or len(pieces) > IOV_MAX:
                return self._send_parts(pieces)
        try:
            sent = self._sock.send(pieces[0]) if one else self._sock.sendmsg(pieces)
        except OSError as error:
            if not is_for_now(error):
                raise
            return pieces
        if sent == size:
            return ()
        self.tear()  # the kernel took a part, though there was room for all of it
        return cut(pieces, sent)

    def _send_parts(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Send as many pieces at a time as the kernel takes whole."""
        ends = [0, *accumulate(map(len, pieces))]
        first, count = 0, len(pieces)
        while first < count:
            most = max(self._most, self._room())
            last = bisect_right(ends, ends[first] + most, first, min(first + IOV_MAX, count) + 1) - 1
            if first < last < count:
                last = whole_frames(pieces, last)
            if last <= first:
                return self._send_torn(pieces[first:])
            if rest := self.send(pieces[first:last]):
                return [*rest, *pieces[last:]]
            first = last
        return ()

    def _room(self) -> int:
        """Return how many bytes the socket has room for at least: the kernel counts its overhead, too."""
        return (self._capacity - untaken(self._sock)) * 3 // 4

    def _send_torn(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        self.tear()
        rest = send_pieces(self._sock, pieces)
        if not rest:
            self.mend()
        return rest
