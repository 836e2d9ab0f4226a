"""What waits for a client: every byte, in order, in files that nobody sees, within the limits."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.continuity.memory import BUFFER_SIZE
from cc_proxy.linux.credentials import ROOT
from cc_proxy.linux.fds import Piece
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from tests.faults import broken
from tests.proxy.support import BLOCK, fill, pair, read_now, running, spool_fds, spool_files, spool_space
from tests.shortages import disk_full_after, few_fds
from tests.wire.support import is_silent

Ends = tuple[socket.socket, socket.socket]

#: So many files has a spool that is full.
FILES = 32


@pytest.fixture
def ends() -> Iterator[Ends]:
    near, far = pair()
    near.setblocking(False)
    with near, far:
        yield near, far


def drain(spool: Spool, ends: Ends) -> bytes:
    """All that waits, through a socket."""
    near, far = ends
    data = bytearray()
    while spool.size:
        try:
            spool.drain_to(near.fileno())
        except BlockingIOError:
            assert not is_silent(far), "the socket is empty and takes nothing"
            data += read_now(far)
    return bytes(data) + read_now(far)


def on_disk(directory: Path) -> int:
    """What the file system says that it has given out."""
    return sum(os.fstat(fd).st_blocks * 512 for fd in spool_fds(directory))


def in_pieces(rng: random.Random, data: bytes) -> list[Piece]:
    pieces: list[Piece] = []
    while data:
        size = rng.randrange(1, len(data) + 1)
        pieces.append(memoryview(data[:size]) if rng.random() < 0.5 else data[:size])
        data = data[size:]
    return pieces


def test_order_over_many_files_and_partial_drains(tmp_path: Path, ends: Ends) -> None:
    limit = 100 * BLOCK
    space = spool_space(tmp_path, session_limit=limit)
    rng = random.Random(1)
    spool = Spool(space, ROOT)
    near, far = ends
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_608)
    written, read = bytearray(), bytearray()
    most_files = 0
    for _ in range(1_500):
        if rng.random() < 0.6:
            data = rng.randbytes(rng.randrange(1, 9_000))
            stored = spool.append(in_pieces(rng, data))
            assert stored == len(data) or limit - spool.held < BLOCK
            written += data[:stored]
        elif spool.size:
            try:
                assert spool.drain_to(near.fileno()) > 0
            except BlockingIOError:
                read += far.recv(rng.randrange(1, 200_000))
        most_files = max(most_files, spool_files(tmp_path))
        assert on_disk(tmp_path) <= spool.held == space.used <= limit
    assert 5 < most_files <= FILES + 1
    read += read_now(far) + drain(spool, ends)
    assert read == written
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_disk_holds_no_more_than_the_limits_however_slowly_clients_read(tmp_path: Path, seed: int) -> None:
    """Of one user's as of all together, and what is held is what `status` is told."""
    rng = random.Random(seed)
    limits = {"session_limit": 60 * BLOCK, "user_limit": 90 * BLOCK, "total_limit": 120 * BLOCK}
    space = spool_space(tmp_path, **limits)
    mine, other = [Spool(space, 1) for _ in range(3)], [Spool(space, 2) for _ in range(3)]
    full = 0
    with ExitStack() as stack:
        clients = []
        for spool in (*mine, *other):
            near, far = (stack.enter_context(end) for end in pair(4_608))
            near.setblocking(False)
            stack.callback(spool.close)
            clients.append((spool, near, far))
        for _ in range(500):
            spool, near, far = rng.choice(clients)
            size = rng.choice([1, 100, 5_000, 20_000])
            if rng.random() < 0.7:
                full += spool.append([bytes(size)]) < size
            elif spool.size:
                read_now(far)
                spool.drain_to(near.fileno())
            assert on_disk(tmp_path) <= space.used <= limits["total_limit"]
            for uid, theirs in ((1, mine), (2, other)):
                held = [spool.held for spool in theirs]
                assert sum(held) == space.used_by(uid) <= limits["user_limit"]
                assert max(held) <= limits["session_limit"]
    assert full > 10
    assert (space.used, spool_files(tmp_path)) == (0, 0)


def test_room_comes_back_long_before_all_is_read(tmp_path: Path, ends: Ends) -> None:
    near, far = ends
    limit = 10 * FILES * BLOCK
    spool = Spool(spool_space(tmp_path, session_limit=limit), ROOT)
    assert spool.append([bytes(2 * limit)]) == limit
    assert spool.append([b"x"]) == 0
    read = 0
    while not (room := spool.append([bytes(limit)])):
        read += spool.drain_to(near.fileno())
        read_now(far)
    assert room == limit // FILES
    assert read <= room + BUFFER_SIZE
    spool.close()


def test_file_that_grows_takes_no_more_than_what_is_in_it(tmp_path: Path) -> None:
    """Some file systems set aside as much again for a file that gets longer, but not where it is long."""
    spool = Spool(spool_space(tmp_path), ROOT)
    for _ in range(300):
        spool.append([bytes(BLOCK)])
        (fd,) = spool_fds(tmp_path)
        assert os.fstat(fd).st_size >= 300 * BLOCK
        assert os.fstat(fd).st_blocks * 512 <= spool.size
    spool.close()


def test_one_drain_moves_no_more_than_is_fair(tmp_path: Path, ends: Ends) -> None:
    near, _ = ends
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    spool = Spool(spool_space(tmp_path), ROOT)
    spool.append([bytes(1_000_000)])
    assert spool.drain_to(near.fileno()) <= BUFFER_SIZE
    spool.close()


def test_thousands_of_pieces_are_stored_whole(tmp_path: Path, ends: Ends) -> None:
    spool = Spool(spool_space(tmp_path), ROOT)
    data = random.Random(2).randbytes(5_000)
    assert spool.append([data[at : at + 1] for at in range(5_000)]) == 5_000
    assert drain(spool, ends) == data


def test_pieces_are_looked_at_once_however_many_there_are(tmp_path: Path) -> None:
    """Tiny frames, in turns for two streams, leave tens of thousands."""

    class Counted(list[bytes]):
        looked_at = 0

        def __iter__(self) -> Iterator[bytes]:
            self.looked_at += len(self)
            return super().__iter__()

    pieces = Counted([b"frame"] * 20_000)
    spool = Spool(spool_space(tmp_path), ROOT)
    assert spool.append(pieces) == 100_000
    assert pieces.looked_at <= 2 * len(pieces)
    spool.close()


@pytest.mark.parametrize(
    ("held", "wanted", "stored"),
    [(0, 100, 100), (0, 101, 100), (99, 1, 1), (99, 2, 1), (100, 1, 0), (100, 0, 0)],
)
def test_session_limit(tmp_path: Path, ends: Ends, held: int, wanted: int, stored: int) -> None:
    """Of whole blocks."""
    space = spool_space(tmp_path, session_limit=100 * BLOCK + 1)
    spool = Spool(space, ROOT)
    data = random.Random(4).randbytes((held + wanted) * BLOCK)
    assert spool.append([data[: held * BLOCK]]) == held * BLOCK
    assert spool.append([data[held * BLOCK :][:1], data[held * BLOCK + 1 :]]) == stored * BLOCK
    assert spool.size == space.used == (held + stored) * BLOCK
    assert drain(spool, ends) == data[: (held + stored) * BLOCK]
    assert spool.append([data]) == min(100 * BLOCK, len(data)), "there is room again"
    spool.close()
    assert space.used == 0


def test_block_that_is_not_full_counts_whole(tmp_path: Path) -> None:
    space = spool_space(tmp_path, session_limit=2 * BLOCK)
    spool = Spool(space, ROOT)
    for size, held in ((1, 1), (BLOCK - 1, 1), (1, 2)):
        assert spool.append([bytes(size)]) == size
        assert spool.held == space.used == held * BLOCK
    spool.close()


def test_a_limit_of_0_stores_nothing_and_opens_nothing(tmp_path: Path) -> None:
    for limits in ({"session_limit": 0}, {"total_limit": 0}, {"user_limit": BLOCK - 1}):
        space = spool_space(tmp_path, **limits)
        spool = Spool(space, ROOT)
        assert spool.append([b"x"]) == 0
        assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)
        spool.close()


def test_total_limit_is_shared(tmp_path: Path, ends: Ends) -> None:
    space = spool_space(tmp_path, session_limit=80 * BLOCK, total_limit=100 * BLOCK)
    first, second = Spool(space, ROOT), Spool(space, ROOT)
    assert first.append([bytes(90 * BLOCK)]) == 80 * BLOCK
    assert second.append([bytes(90 * BLOCK)]) == 20 * BLOCK
    assert second.append([b"x"]) == 0
    assert drain(first, ends) == bytes(80 * BLOCK)
    assert second.append([bytes(90 * BLOCK)]) == 60 * BLOCK, "up to its own limit"
    assert space.used == 80 * BLOCK
    second.close()
    first.close()
    assert space.used == 0


def test_nothing_is_taken_beyond_the_total_by_many_threads(tmp_path: Path) -> None:
    space = spool_space(tmp_path, total_limit=10 * BLOCK)
    excess: list[int] = []

    def take_and_give_back(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2_000):
            taken = space.take(rng.randrange(8 * BLOCK), ROOT)
            if not 0 <= space.used <= 10 * BLOCK:
                excess.append(space.used)
            space.give_back(taken, ROOT)

    with running([threading.Thread(target=take_and_give_back, args=(seed,)) for seed in range(4)]):
        pass
    assert not excess
    assert space.used == 0


@pytest.mark.parametrize("directory", ["missing", "file"])
def test_directory_that_cannot_be_used(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").touch()
    space = spool_space(tmp_path / directory)
    spool = Spool(space, ROOT)
    with pytest.raises(OSError):  # noqa: PT011 - which one is the file system's to say
        spool.append([b"x" * 100])
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)
    spool.close()
    assert space.used == 0


def test_without_fds_nothing_is_stored_and_nothing_taken(tmp_path: Path) -> None:
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    with few_fds(), pytest.raises(OSError, match="Too many open files"):
        spool.append([b"x" * 100])
    assert (spool.size, space.used) == (0, 0)
    assert spool.append([b"x" * 100]) == 100
    spool.close()


def test_full_disk_stores_what_fits_and_then_says_so(tmp_path: Path, disk_size: int, ends: Ends) -> None:
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    data = random.Random(3).randbytes(100_000)
    assert spool.append([data[:30_000], data[30_000:]]) == disk_size
    assert spool.size == space.used == disk_size == on_disk(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011
        spool.append([b"more"])
    assert spool.size == space.used == disk_size, "what was there is still there"
    assert drain(spool, ends) == data[:disk_size]
    assert (space.used, spool_files(tmp_path)) == (0, 0)
    assert spool.append([b"more"]) == 4, "there is room again"
    assert drain(spool, ends) == b"more"
    assert (space.used, spool_files(tmp_path)) == (0, 0)


def test_full_disk_at_the_first_byte_leaves_no_empty_file(tmp_path: Path, disk_size: int) -> None:
    (tmp_path / "all of it").write_bytes(bytes(disk_size))
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    with pytest.raises(OSError, match="No space left"):
        spool.append([b"x"])
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)


def test_file_that_cannot_have_its_size_is_not_kept(tmp_path: Path) -> None:
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    with disk_full_after(0), pytest.raises(OSError, match="File too large"):
        spool.append([b"x"])
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)


def test_files_have_no_name_and_are_nobody_elses(tmp_path: Path) -> None:
    spool = Spool(spool_space(tmp_path), ROOT)
    spool.append([b"secret"])
    (fd,) = spool_fds(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    assert not os.get_inheritable(fd)
    spool.close()


def has_no_name(_path: str, flags: int, *_: int, **__: int) -> bool:
    return flags & os.O_TMPFILE == os.O_TMPFILE


def test_files_have_no_name_where_the_file_system_cannot_make_such(tmp_path: Path, ends: Ends) -> None:
    spool = Spool(spool_space(tmp_path), ROOT)
    with broken(os, "open", OSError(95, "Operation not supported"), when=has_no_name) as refused:
        assert spool.append([b"secret"]) == 6
    assert refused.is_set()
    (fd,) = spool_fds(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    assert os.fstat(fd).st_nlink == 0
    assert not os.get_inheritable(fd)
    assert drain(spool, ends) == b"secret"


def test_socket_that_is_full_takes_nothing_and_nothing_is_lost(tmp_path: Path, ends: Ends) -> None:
    near, far = ends
    fill(near)
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    spool.append([b"first"])
    with pytest.raises(BlockingIOError):
        spool.drain_to(near.fileno())
    assert (spool.size, space.used) == (5, BLOCK)
    read_now(far)
    assert drain(spool, ends) == b"first"


def test_client_that_is_gone_is_an_error_and_what_waits_is_thrown_away(tmp_path: Path, ends: Ends) -> None:
    near, far = ends
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    spool.append([bytes(1_000)])
    far.close()
    with pytest.raises(BrokenPipeError):
        spool.drain_to(near.fileno())
    spool.close()
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)
    spool.close()
    assert space.used == 0


def test_closed_in_the_middle_gives_back_what_is_left(tmp_path: Path, ends: Ends) -> None:
    space = spool_space(tmp_path)
    spool, other = Spool(space, ROOT), Spool(space, ROOT)
    for _ in range(5):
        spool.append([bytes(100_000)])
    other.append([bytes(10)])
    spool.drain_to(ends[0].fileno())
    assert space.used == spool.held + BLOCK >= 500_000, "a file is held as long as any of it waits"
    spool.close()
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, BLOCK, 1)
    other.close()
    assert (space.used, spool_files(tmp_path)) == (0, 0)


def test_what_is_on_its_way_in_the_socket_never_changes(tmp_path: Path, ends: Ends) -> None:
    """sendfile leaves the file's own pages in the socket: who reads them reads what they hold by then."""
    spool = Spool(spool_space(tmp_path), ROOT)
    near, far = ends
    sent = b""
    for number in range(30):
        data = bytes([65 + number]) * (1 + number * 150)
        spool.append([data[:100], data[100:]])
        sent += data
        while spool.size:
            spool.drain_to(near.fileno())
    assert spool_files(tmp_path) == 0
    spool.append([b"\0" * 70_000])  # after all of that was read by nobody
    assert read_now(far) == sent
    spool.close()


def test_files_of_a_client_that_is_slow_for_ever_hold_what_waits_and_little_more(
    tmp_path: Path, ends: Ends
) -> None:
    limit = 3 * FILES * BLOCK
    spool = Spool(spool_space(tmp_path, session_limit=limit), ROOT)
    near, far = ends
    spool.append([bytes(5_000)])
    for _ in range(100):
        spool.append([bytes(4_000)])
        moved = 0
        while moved < 4_000:
            moved += spool.drain_to(near.fileno())
            read_now(far)
        assert on_disk(tmp_path) <= spool.size + 2 * limit // FILES
    spool.close()


def test_space_is_what_the_settings_say(space: SpoolSpace) -> None:
    assert space.take(10 * BLOCK, ROOT) == 10 * BLOCK
    assert space.take(BLOCK - 1, ROOT) == 0
    assert space.take(0, ROOT) == 0
    assert space.take(-5 * BLOCK, ROOT) == 0
    assert space.take(1 << 40, ROOT) == (1 << 30) - 10 * BLOCK
    assert space.take(BLOCK, ROOT) == 0
    space.give_back(1 << 30, ROOT)
    assert space.used == 0
