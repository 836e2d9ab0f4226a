"""What waits for a client: every byte, in order, in files that nobody sees, within the limits."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.linux.credentials import ROOT
from cc_proxy.linux.fds import Piece
from cc_proxy.proxy.streams import spool as spool_module
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from tests.proxy.support import fill, pair, read_now, running, spool_fds, spool_files, spool_space
from tests.wire.support import is_silent

Ends = tuple[socket.socket, socket.socket]


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


def in_pieces(rng: random.Random, data: bytes) -> list[Piece]:
    pieces: list[Piece] = []
    while data:
        size = rng.randrange(1, len(data) + 1)
        pieces.append(memoryview(data[:size]) if rng.random() < 0.5 else data[:size])
        data = data[size:]
    return pieces


def test_order_over_many_files_and_partial_drains(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_FILE_SIZE", 10_000)
    monkeypatch.setattr(spool_module, "_DRAIN_AT_ONCE", 3_000)
    space = spool_space(tmp_path)
    rng = random.Random(1)
    spool = Spool(space, ROOT)
    near, far = ends
    written, read = bytearray(), bytearray()
    most_files = 0
    for _ in range(1_500):
        if rng.random() < 0.4:
            data = rng.randbytes(rng.randrange(1, 9_000))
            assert spool.append(in_pieces(rng, data)) == len(data)
            written += data
        elif spool.size:
            try:
                assert 0 < spool.drain_to(near.fileno()) <= 3_000
            except BlockingIOError:
                read += far.recv(rng.randrange(1, 200_000))
        most_files = max(most_files, spool_files(tmp_path))
        assert spool.size == space.used
        assert spool_files(tmp_path) <= spool.size // 10_000 + 2
    assert most_files > 5
    read += read_now(far) + drain(spool, ends)
    assert read == written
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)


def test_a_file_ends_where_it_is_long_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_FILE_SIZE", 100)
    spool = Spool(spool_space(tmp_path), ROOT)
    spool.append([bytes(99)])
    spool.append([bytes(1)])
    assert spool_files(tmp_path) == 1
    spool.append([bytes(500)])
    assert spool_files(tmp_path) == 2
    spool.append([bytes(1)])
    assert spool_files(tmp_path) == 3
    spool.close()
    assert spool_files(tmp_path) == 0


def test_one_drain_moves_no_more_than_is_fair(tmp_path: Path, ends: Ends) -> None:
    near, _ = ends
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    spool = Spool(spool_space(tmp_path), ROOT)
    spool.append([bytes(1_000_000)])
    assert spool.drain_to(near.fileno()) <= spool_module._DRAIN_AT_ONCE
    spool.close()


def test_thousands_of_pieces_are_stored_whole(tmp_path: Path, ends: Ends) -> None:
    spool = Spool(spool_space(tmp_path), ROOT)
    data = random.Random(2).randbytes(5_000)
    assert spool.append([data[at : at + 1] for at in range(5_000)]) == 5_000
    assert drain(spool, ends) == data


@pytest.mark.parametrize(
    ("held", "wanted", "stored"),
    [(0, 100, 100), (0, 101, 100), (99, 1, 1), (99, 2, 1), (100, 1, 0), (100, 0, 0)],
)
def test_session_limit(tmp_path: Path, ends: Ends, held: int, wanted: int, stored: int) -> None:
    space = spool_space(tmp_path, session_limit=100)
    spool = Spool(space, ROOT)
    data = bytes(range(held)) + bytes(range(100, 100 + wanted))
    assert spool.append([data[:held]]) == held
    assert spool.append([data[held : held + 1], data[held + 1 :]]) == stored
    assert spool.size == space.used == held + stored
    assert drain(spool, ends) == data[: held + stored]
    assert spool.append([data]) == min(100, len(data)), "there is room again"
    spool.close()
    assert space.used == 0


def test_a_limit_of_0_stores_nothing_and_opens_nothing(tmp_path: Path) -> None:
    for space in (spool_space(tmp_path, session_limit=0), spool_space(tmp_path, total_limit=0)):
        spool = Spool(space, ROOT)
        assert spool.append([b"x"]) == 0
        assert (spool.size, space.used, spool_files(tmp_path)) == (0, 0, 0)
        spool.close()


def test_total_limit_is_shared(tmp_path: Path, ends: Ends) -> None:
    space = spool_space(tmp_path, session_limit=80, total_limit=100)
    first, second = Spool(space, ROOT), Spool(space, ROOT)
    assert first.append([bytes(90)]) == 80
    assert second.append([bytes(90)]) == 20
    assert second.append([b"x"]) == 0
    assert drain(first, ends) == bytes(80)
    assert second.append([bytes(90)]) == 60, "up to its own limit"
    assert space.used == 80
    second.close()
    first.close()
    assert space.used == 0


def test_nothing_is_taken_beyond_the_total_by_many_threads(tmp_path: Path) -> None:
    space = spool_space(tmp_path, total_limit=1_000)
    excess: list[int] = []

    def take_and_give_back(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2_000):
            taken = space.take(rng.randrange(800), ROOT)
            if not 0 <= space.used <= 1_000:
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


def test_without_fds_nothing_is_stored_and_nothing_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fd(*args: object, **kwargs: object) -> int:
        raise OSError(24, "Too many open files")

    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_fd)
        with pytest.raises(OSError, match="Too many open files"):
            spool.append([b"x" * 100])
    assert (spool.size, space.used) == (0, 0)
    assert spool.append([b"x" * 100]) == 100
    spool.close()


def test_full_disk_stores_what_fits_and_then_says_so(tmp_path: Path, file_limit: int, ends: Ends) -> None:
    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    data = random.Random(3).randbytes(100_000)
    assert spool.append([data[:30_000], data[30_000:]]) == file_limit
    assert spool.size == space.used == file_limit
    with pytest.raises(OSError):  # noqa: PT011
        spool.append([b"more"])
    assert spool.size == space.used == file_limit, "what was there is still there"
    assert drain(spool, ends) == data[:file_limit]
    assert (space.used, spool_files(tmp_path)) == (0, 0)
    assert spool.append([b"more"]) == 4, "there is room again"
    assert drain(spool, ends) == b"more"
    assert (space.used, spool_files(tmp_path)) == (0, 0)


def test_full_disk_at_the_first_byte_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    space = spool_space(tmp_path)
    spool = Spool(space, ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="No space left"):
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


def test_files_have_no_name_where_the_file_system_cannot_make_such(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def without_tmpfile(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", without_tmpfile)
    spool = Spool(spool_space(tmp_path), ROOT)
    assert spool.append([b"secret"]) == 6
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
    assert spool.size == space.used == 5
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


def test_closed_in_the_middle_gives_back_what_is_left(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_FILE_SIZE", 1_000)
    monkeypatch.setattr(spool_module, "_DRAIN_AT_ONCE", 700)
    space = spool_space(tmp_path)
    spool, other = Spool(space, ROOT), Spool(space, ROOT)
    for _ in range(5):
        spool.append([bytes(600)])
    other.append([bytes(10)])
    spool.drain_to(ends[0].fileno())
    assert space.used == 3_000 - 700 + 10
    spool.close()
    assert (spool.size, space.used, spool_files(tmp_path)) == (0, 10, 1)
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
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_FILE_SIZE", 10_000)
    spool = Spool(spool_space(tmp_path), ROOT)
    near, far = ends
    spool.append([bytes(5_000)])
    for _ in range(100):
        spool.append([bytes(4_000)])
        moved = 0
        while moved < 4_000:
            moved += spool.drain_to(near.fileno())
            read_now(far)
        assert sum(os.fstat(fd).st_size for fd in spool_fds(tmp_path)) <= spool.size + 15_000
    spool.close()


def test_space_is_what_the_settings_say(space: SpoolSpace) -> None:
    assert space.take(10, ROOT) == 10
    assert space.take(0, ROOT) == 0
    assert space.take(-5, ROOT) == 0
    assert space.take(1 << 40, ROOT) == (1 << 30) - 10
    assert space.take(1, ROOT) == 0
    space.give_back(1 << 30, ROOT)
    assert space.used == 0
