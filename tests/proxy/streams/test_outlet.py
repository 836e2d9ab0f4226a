"""What is sent to a peer: whole frames, or a word that says that it may be a part of one."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from cc_proxy.api.frames import encode_frame
from cc_proxy.linux.fds import Piece
from cc_proxy.proxy.streams.outlet import Outlet
from tests.proxy.support import pair, read_now

TORN = 1


class Case:
    """An outlet, its peer, and its cell."""

    def __init__(self, buffer: int | None) -> None:
        self.ours, self.peer = pair(buffer)
        self.ours.setblocking(False)
        self.cell = memoryview(bytearray(16)).cast("Q")
        self.outlet = Outlet(self.ours, self.cell, TORN)
        self.sent = bytearray()
        self.received = bytearray()
        self._whole = 0  # how many bytes are known to be whole frames

    @property
    def torn(self) -> bool:
        return bool(self.cell[TORN])

    def send(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Send them; what is left comes back, and what went out is whole frames unless it is torn."""
        rest = self.outlet.send(pieces)
        whole = b"".join(pieces)
        self.sent += whole[: len(whole) - sum(map(len, rest))]
        while self._whole < len(self.sent):
            self._whole += int.from_bytes(self.sent[self._whole + 8 : self._whole + 12], "big")
        assert self.torn or self._whole == len(self.sent)
        return rest

    def send_all(self, pieces: Sequence[Piece]) -> None:
        while pieces:
            pieces = self.send(pieces)
            self.received += read_now(self.peer)
        self.received += read_now(self.peer)
        assert not self.torn
        assert self.received == self.sent

    def close(self) -> None:
        self.ours.close()
        self.peer.close()


def frame_of(rng: random.Random, longest: int) -> bytes:
    return encode_frame(rng.randrange(9), rng.randbytes(rng.randrange(longest)))


@pytest.fixture(params=[4_608, 20_000, None], ids=["small", "medium", "usual"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with closing(Case(request.param)) as case:
        yield case


@pytest.mark.parametrize("longest", [100, 2_000])
def test_only_whole_frames_are_sent_however_full_the_socket_is(case: Case, longest: int) -> None:
    rng = random.Random(1)
    pieces: Sequence[Piece] = ()
    for _ in range(100):
        more = [frame_of(rng, longest) for _ in range(rng.choice([1, 1, 5, 60, 1_500]))]
        pieces = case.send(more if not pieces else [*pieces, *more[:20]])
        assert not case.torn
        if len(case.sent) > len(case.received):
            case.received += case.peer.recv(rng.randrange(1, 50_000))
    case.send_all(pieces)


def test_header_and_payload_that_are_two_pieces_go_together(case: Case) -> None:
    payload = memoryview(bytes(2_000))
    pieces: list[Piece] = []
    for _ in range(200):
        pieces += (encode_frame(1, payload)[:12], payload, encode_frame(1))
    rest = case.send(pieces)
    while rest:
        assert not case.torn
        read_now(case.peer)
        rest = case.send(rest)


def test_frame_that_is_too_long_is_sent_in_pieces_and_the_cell_says_so(case: Case) -> None:
    pieces: Sequence[Piece] = [encode_frame(1), encode_frame(2, bytes(1 << 20)), encode_frame(3)]
    pieces = case.send(pieces)
    assert case.torn
    assert pieces
    case.send_all(pieces)


def test_what_a_socket_takes_a_part_of_after_all_is_said(case: Case) -> None:
    """Somebody has made its buffer smaller."""
    case.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_608)
    pieces: Sequence[Piece] = [encode_frame(1, bytes(30_000))]
    pieces = case.send(pieces)
    assert case.torn == bool(pieces)
    case.send_all(pieces)


def test_peer_that_has_gone_is_an_error(case: Case) -> None:
    case.peer.close()
    for pieces in ([b"one"], [b"one", b"two"]):
        with pytest.raises(BrokenPipeError):
            case.outlet.send(pieces)
