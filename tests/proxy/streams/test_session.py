"""One client's streams: order from the socket to the spool and back, and patience that is not abused."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from cc_proxy.proxy.streams import session as session_module
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from tests.clock import Clock
from tests.faults import broken
from tests.proxy.support import (
    BLOCK,
    new_session,
    pair,
    read_now,
    read_to_end,
    spool_files,
    spool_space,
)
from tests.shortages import disk_full_after
from tests.wire.support import at_end, is_silent

SMALL = 4_608
#: Of the time that passes, so much comes back of a patience that is used up.
REGAINED = 0.25


class Case:
    """A session and its client."""

    def __init__(self, space: SpoolSpace) -> None:
        near, self.client = pair(SMALL)
        self.space = space
        self.session = new_session(range(1, 3), near, space)
        self.sent = bytearray()
        self.read = bytearray()

    def deliver(self, data: bytes) -> None:
        self.sent += data
        assert self.session.deliver([memoryview(data)[:100], memoryview(data)[100:]]) == self.session.waits

    def waits(self) -> bool:
        return self.session.waits

    def pending(self) -> bool:
        return bool(self.session.pending)

    def take(self) -> None:
        self.read += read_now(self.client)

    def take_all(self) -> None:
        while self.session.waits:
            self.take()
            self.session.flush()
        self.take()
        assert self.read == self.sent
        assert self.space.used == 0

    def make_full(self) -> None:
        """Direct output until the client's socket is full."""
        while not self.session.pending:
            self.deliver(random.Random(len(self.sent)).randbytes(2_000))

    def deliver_more_than_fits(self) -> None:
        self.deliver(random.Random(7).randbytes(50_000))

    def close(self) -> None:
        self.session.close()
        self.client.close()


CaseMaker = Callable[[SpoolSpace], Case]


@pytest.fixture
def make_case() -> Iterator[CaseMaker]:
    with ExitStack() as stack:

        def make(space: SpoolSpace) -> Case:
            case = Case(space)
            stack.callback(case.close)
            return case

        yield make


@pytest.fixture
def case(make_case: CaseMaker, space: SpoolSpace) -> Case:
    return make_case(space)


@pytest.fixture
def tight_case(make_case: CaseMaker, tmp_path: Path) -> Case:
    """For which no more than one block of the disk may be held."""
    return make_case(spool_space(tmp_path, session_limit=BLOCK))


def test_output_goes_straight_to_a_client_that_keeps_up(case: Case) -> None:
    case.deliver(b"x" * 1_000)
    assert not case.waits()
    assert case.session.patient_until == math.inf
    assert read_now(case.client) == case.sent


def test_full_socket_makes_it_pending_with_patience(case: Case, clock: Clock) -> None:
    case.make_full()
    assert case.waits()
    assert case.session.spooled == 0
    assert case.session.patient_until == clock.now + session_module.PATIENCE
    case.take_all()
    assert not case.pending()
    assert case.session.patient_until == math.inf


def test_pending_output_moves_to_the_spool_and_what_follows_goes_behind_it(case: Case) -> None:
    case.make_full()
    case.session.spill()
    assert case.waits()
    assert not case.pending()
    assert case.session.patient_until == math.inf
    case.deliver(b"behind" * BLOCK)
    assert not case.pending()
    spooled = case.session.spooled
    assert spooled >= 6 * BLOCK
    case.take()
    case.deliver(b"still behind" * BLOCK)  # although the socket has room by now
    assert case.session.spooled == spooled + 12 * BLOCK
    case.take_all()
    case.deliver(b"direct again")
    assert not case.waits()
    case.take_all()


def test_what_the_spool_does_not_take_stays_pending_in_front(tight_case: Case) -> None:
    case = tight_case
    case.make_full()
    case.deliver_more_than_fits()
    case.session.spill()
    assert case.pending()
    assert case.session.spooled == BLOCK
    assert case.session.stuck == "the spool is full"
    assert case.session.patient_until is not None, "others may make room"
    held = sum(map(len, case.session.pending))
    case.take()
    case.session.flush()
    assert sum(map(len, case.session.pending)) < held
    case.take_all()
    case.deliver(b"direct again")
    assert not case.waits()
    case.take_all()


def test_pending_output_follows_into_the_spool_as_that_gets_room(
    make_case: CaseMaker, tmp_path: Path
) -> None:
    """So that the VM is read again long before its client has read everything."""
    case = make_case(spool_space(tmp_path, session_limit=5 * BLOCK))
    case.make_full()
    case.session.spill()
    case.deliver(random.Random(1).randbytes(6 * BLOCK))
    assert case.session.spooled == 5 * BLOCK
    held = sum(map(len, case.session.pending))
    while case.pending():
        case.take()
        case.session.flush()
        left = sum(map(len, case.session.pending))
        assert left in {held, held - BLOCK, 0}
        held = left
    assert case.session.spooled > 3 * BLOCK
    case.take_all()


def test_who_takes_a_little_in_time_has_its_whole_patience(case: Case, clock: Clock) -> None:
    case.make_full()
    until = case.session.patient_until
    case.deliver_more_than_fits()
    case.read += case.client.recv(100_000)
    case.session.flush()
    assert case.pending()
    assert case.session.spooled == 0
    assert case.session.patient_until == until
    case.take_all()


def test_output_behind_pending_output_waits_with_it(case: Case) -> None:
    """As the last of a VM does."""
    case.make_full()
    until = case.session.patient_until
    for number in range(3):
        case.deliver(b"%d" % number * 3_000)
    assert case.session.patient_until == until
    assert case.session.spooled == 0
    case.take_all()


def test_spool_that_cannot_be_used_leaves_it_all_pending(
    make_case: CaseMaker, tmp_path: Path, clock: Clock
) -> None:
    directory = tmp_path / "later"
    case = make_case(spool_space(directory))
    case.make_full()
    before = [bytes(piece) for piece in case.session.pending]
    for again in (case.session.spill, case.session.look):
        again()
        assert [bytes(piece) for piece in case.session.pending] == before
        assert case.session.stuck == "the spool cannot be used: No such file or directory"
        assert case.session.patient_until == math.inf
        assert case.space.used == 0
    directory.mkdir()
    case.session.look()
    assert not case.pending()
    assert case.session.stuck == ""
    case.take_all()
    case.make_full()
    assert case.session.patient_until <= clock.now + session_module.PATIENCE, "as if nothing had been"


def test_spool_that_cannot_be_used_any_more_keeps_the_order(
    case: Case,
) -> None:
    case.make_full()
    case.session.spill()
    with disk_full_after(0):
        case.deliver(b"behind" * 1_000)
        assert case.pending()
        assert case.session.stuck == "the spool cannot be used: File too large"
        while case.session.waits:
            case.take()
            case.session.flush()
    assert case.session.stuck == ""
    case.take_all()


def test_client_that_goes_while_nothing_waits(case: Case) -> None:
    case.client.close()
    case.deliver(b"x")
    assert case.session.output_gone
    assert not case.waits()
    case.deliver(b"x")
    assert not case.waits()


def test_client_that_goes_while_output_is_pending(case: Case) -> None:
    case.make_full()
    case.client.close()
    case.session.flush()
    assert case.session.output_gone
    assert not case.waits()
    assert case.session.patient_until == math.inf


def test_client_that_goes_while_output_is_spooled(case: Case, tmp_path: Path) -> None:
    case.make_full()
    case.session.spill()
    assert spool_files(tmp_path) == 1
    case.client.close()
    case.session.flush()
    assert case.session.output_gone
    assert not case.waits()
    assert (case.space.used, spool_files(tmp_path)) == (0, 0)
    case.deliver(b"x")
    assert (case.session.waits, case.space.used) == (False, 0)


def test_client_that_goes_while_the_spool_is_full(tight_case: Case, tmp_path: Path) -> None:
    case = tight_case
    case.make_full()
    case.deliver_more_than_fits()
    case.session.spill()
    assert case.pending()
    assert case.session.spooled == BLOCK
    case.client.close()
    case.session.flush()
    assert case.session.output_gone
    assert not case.waits()
    assert (case.space.used, spool_files(tmp_path)) == (0, 0)


def test_client_that_takes_no_more_but_may_still_send(case: Case) -> None:
    case.client.shutdown(socket.SHUT_RD)
    case.deliver(b"x")
    assert case.session.output_gone
    case.client.sendall(b"stdin")
    view = memoryview(bytearray(10))
    assert case.session.read(view, 0, 10, 1) == 5


def test_reading(case: Case) -> None:
    view = memoryview(bytearray(10))
    with pytest.raises(BlockingIOError):
        case.session.read(view, 0, 10, 1)
    case.client.sendall(b"stdin")
    assert case.session.read(view, 0, 10, 1) == 5
    assert bytes(view[:5]) == b"stdin"
    case.client.shutdown(socket.SHUT_WR)
    assert case.session.read(view, 0, 10, 1) == 0


def test_client_that_goes_with_output_unread_sent_what_it_sent_and_then_ended(case: Case) -> None:
    case.deliver(b"never read")
    case.client.sendall(b"stdin")
    case.client.close()
    view = memoryview(bytearray(10))
    # The kernel calls it a reset, before or behind what was sent.
    assert case.session.read(view, 0, 10, 1) in {0, 5}
    assert case.session.read(view, 0, 10, 1) in {0, 5}
    assert case.session.read(view, 0, 10, 1) == 0


def test_closed_with_output_waiting_gives_back_its_space(case: Case, tmp_path: Path) -> None:
    case.make_full()
    case.session.spill()
    case.client.sendall(b"stdin that is never read")
    case.session.close()
    assert not case.waits()
    assert (case.space.used, spool_files(tmp_path)) == (0, 0)
    case.read += read_to_end(case.client)
    assert case.sent.startswith(case.read)
    assert at_end(case.client)


@pytest.mark.parametrize("fails", [False, True])
def test_who_made_it_is_told_that_it_is_closed(space: SpoolSpace, fails: bool) -> None:
    """Though its spool cannot be given up."""
    near, client = pair()
    closed: list[int] = []
    session = new_session(range(1, 3), near, space, on_close=lambda: closed.append(near.fileno()))
    assert closed == []
    with client, broken(Spool, "close", when=lambda _: fails):
        with pytest.raises(KeyError) if fails else nullcontext():
            session.close()
        assert closed == [-1], "once, and its fd is closed by then"
        assert at_end(client)


def test_patience_is_used_up_and_comes_back_slowly(case: Case, clock: Clock) -> None:
    full = session_module.PATIENCE
    case.make_full()
    clock.now += 0.75 * full
    case.take_all()  # just in time, and three quarters of the patience are gone
    case.make_full()
    assert case.session.patient_until - clock.now == pytest.approx(0.25 * full + 0.75 * full * REGAINED)
    clock.now = case.session.patient_until
    case.session.spill()
    case.take_all()
    case.make_full()
    assert case.session.patient_until - clock.now < 0.2 * full
    case.session.spill()
    case.take_all()
    clock.now += 100 * full
    case.make_full()
    assert case.session.patient_until == clock.now + full, "and never more than that"


def test_one_client_slows_its_vm_down_by_a_quarter_at_the_most(case: Case, clock: Clock) -> None:
    rng = random.Random(6)
    begun, waited = clock.now, 0.0
    for _ in range(300):
        clock.now += rng.random() * 0.01
        case.make_full()
        until = case.session.patient_until
        assert until is not None
        if rng.random() < 0.5:
            waited += until - clock.now
            clock.now = until
            case.session.spill()
        else:
            moment = rng.random() * (until - clock.now)
            waited += moment
            clock.now += moment
        case.take_all()
    elapsed = clock.now - begun
    assert waited <= session_module.PATIENCE + elapsed * REGAINED
    assert waited > 0.1 * elapsed, "it is given what is left"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0, BLOCK, 5 * BLOCK, 256 * BLOCK])
def test_every_byte_in_order_whatever_happens(
    make_case: CaseMaker, tmp_path: Path, seed: int, limit: int
) -> None:
    """As `Output` drives it: nothing is delivered while something is pending, whose memory is used again."""
    rng = random.Random(f"{seed} {limit}")
    case = make_case(spool_space(tmp_path, session_limit=limit))
    session = case.session
    buffer = bytearray(10_000)
    view = memoryview(buffer)
    states = set()
    for _ in range(1_000):
        states.add((bool(session.pending), bool(session.spooled)))
        match rng.randrange(8):
            case 0 | 1 | 2 | 3 if not session.pending:
                size = rng.randrange(2, len(buffer))
                buffer[:size] = rng.randbytes(size)
                case.sent += buffer[:size]
                middle = rng.randrange(1, size)
                session.deliver([view[:middle], view[middle:size]])
            case 4 if session.waits:
                session.flush()
            case 5 if session.pending:
                session.spill()
            case 6:
                case.take()
            case _ if not is_silent(case.client):
                case.read += case.client.recv(rng.randrange(1, 3_000))
        assert case.space.used == session.spooled <= limit
    assert states >= {(False, False), (True, False)}
    assert not limit or (False, True) in states
    assert limit not in {BLOCK, 5 * BLOCK} or (True, True) in states
    case.take_all()
