"""A pump with the test at all of its ends, and other things that these tests share."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

from cc_proxy.api.status import Streams
from cc_proxy.continuity.cells import CELL_SIZE
from cc_proxy.continuity.keeper import Slot
from cc_proxy.continuity.memory import private_memory
from cc_proxy.continuity.state import Record
from cc_proxy.hyperstart.control import ControlMessage
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.linux.credentials import Credentials
from cc_proxy.proxy.streams.interfaces import Pacing, Place, Sockets
from cc_proxy.proxy.streams.pump import Pump
from cc_proxy.proxy.streams.session import Session, Whose
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from cc_proxy.proxy.users import User, Users
from cc_proxy.proxy.vms.console import Console
from cc_proxy.proxy.vms.control import ControlLink
from cc_proxy.proxy.vms.dialer import Dialer
from cc_proxy.settings import Limits, LiveSettings, Settings, SpoolSettings
from tests.connector import CONNECTOR
from tests.wire.support import (
    FRAME,
    READY,
    WAIT,
    Frame,
    Stream,
    command,
    is_silent,
    read_exact,
    unread_by_peer,
    wait_until,
)

T = TypeVar("T")


def new_user(limits: Limits | None = None, who: Credentials | None = None) -> User:
    """One who has nothing yet."""
    users = Users(LiveSettings(Settings(limits=limits or Limits())))
    return users.of((who or Credentials.own()).uid)


def new_session(
    seqs: range,
    sock: socket.socket,
    space: SpoolSpace,
    window: StdinWindow | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> Session:
    """A session of this process's that counts for nobody."""
    whose = Whose("vm", os.getuid(), os.getpid())
    return Session(seqs, sock, whose, Spool(space, whose.uid), window, Place(on_close))


def dialer_of(who: Credentials, own_address: str | bytes | None = None) -> Dialer:
    return Dialer(who, CONNECTOR, own_address)


DIALER = dialer_of(Credentials.own())

#: What the disk gives out at least.
BLOCK = mmap.PAGESIZE

#: Too long for any test, so that what waits for it shows.
NEVER = 3_600.0


def spool_space(
    directory: Path | str,
    session_limit: int = 64 << 20,
    total_limit: int = 1 << 30,
    user_limit: int | None = None,
) -> SpoolSpace:
    spool = SpoolSettings(
        directory=str(directory),
        session_limit=session_limit,
        total_limit=total_limit,
        user_limit=total_limit if user_limit is None else user_limit,
    )
    return SpoolSpace(LiveSettings(Settings(spool=spool)))


def pair(buffer: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Two ends of a stream. What the first one may have on its way is `buffer` bytes, the kernel's way."""
    near, far = socket.socketpair()
    if buffer is not None:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    far.settimeout(WAIT)
    return near, far


def read_now(sock: socket.socket) -> bytes:
    """All that has arrived."""
    data = bytearray()
    while not is_silent(sock) and (piece := sock.recv(1 << 20)):
        data += piece
    return bytes(data)


def read_to_end(sock: socket.socket) -> bytes:
    """Everything up to the end of file. A reset is no end of file."""
    data = bytearray()
    while piece := sock.recv(1 << 20):
        data += piece
    return bytes(data)


def frames_of(data: bytes) -> list[Frame]:
    """Takes apart what has to be whole frames."""
    frames = []
    while data:
        seq, length = FRAME.unpack_from(data)
        assert FRAME.size <= length <= len(data), "not a whole frame"
        frames.append(Frame(seq, data[FRAME.size : length]))
        data = data[length:]
    return frames


def fill(sock: socket.socket) -> int:
    """Sends until nothing more fits, on a socket without a timeout; returns how much that was."""
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(4096), socket.MSG_DONTWAIT)
    return sent


def open_fds() -> dict[int, str]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return fds


def spool_fds(directory: Path) -> list[int]:
    """Files without a name that are open and were made in `directory`."""
    return [
        fd
        for fd, target in open_fds().items()
        if target.startswith(f"{directory}/") and target.endswith("(deleted)")
    ]


def spool_files(directory: Path) -> int:
    """How many of those there are."""
    return len(spool_fds(directory))


class FakeOwner:
    """Whose pump it is: notes what it is told."""

    def __init__(self, container_id: str) -> None:
        self.container_id = container_id
        self.causes: list[str] = []
        self.over = threading.Event()

    def lose(self, cause: str) -> None:
        self.causes.append(cause)

    def ended(self) -> None:
        assert not self.over.is_set()
        self.over.set()


class Ends:
    """What a VM's pump takes over, the test's ends of all those sockets, and clients."""

    def __init__(
        self, space: SpoolSpace, *, vm: str = "vm", window: int = 0, io_buffer: int | None = None
    ) -> None:
        self.space = space
        self.owner = FakeOwner(vm)
        self.events: list[ControlMessage] = []
        self._window = window
        self._next_seq = 1
        self._streams: list[Stream] = []
        self.near_io, self.io = pair(io_buffer)
        ctl, self.ctl = pair()
        self.control = ControlLink(ctl, self.events.append)
        self.ctl.sendall(command(READY))
        self.control.wait_until_up(self.near_io, WAIT, WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def session(self, streams: int = 2, *, buffer: int | None = None) -> tuple[Session, Stream]:
        """A session that nobody has taken over yet, and its client's end."""
        near, far = pair(buffer)
        seqs = range(self._next_seq, self._next_seq + streams)
        self._next_seq = seqs.stop
        stream = Stream(far, seqs.start)
        self._streams.append(stream)
        window = StdinWindow(seqs.start, self._window) if self._window else None
        return new_session(seqs, near, self.space, window), stream

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self.io.close()
        self.ctl.close()


class Rig(Ends):
    """A pump that runs, and the far ends of all its sockets."""

    def __init__(
        self,
        space: SpoolSpace,
        *,
        vm: str = "vm",
        window: int = 0,
        echo_timeout: float = NEVER,
        io_buffer: int | None = None,
        console: Console | None = None,
        one_at_a_time: Callable[[bool], AbstractContextManager[None]] | None = None,
        started: bool = True,
    ) -> None:
        super().__init__(space, vm=vm, window=window, io_buffer=io_buffer)
        self._started = started
        turns = one_at_a_time or new_user().one_batch
        pacing = Pacing(echo_timeout, lambda _commands, done: done(True))
        self.pump = Pump(
            self.owner, Sockets(self.near_io, self.control, console), private_memory(), turns, pacing
        )
        if started:
            self.pump.start()

    def open(self, streams: int = 2, *, buffer: int | None = None) -> Stream:
        session, stream = self.session(streams, buffer=buffer)
        assert self.pump.add(session)
        self.pump.open_stdin([stream.base])
        return stream

    def streams(self) -> Streams:
        """What the pump says of its streams."""
        return self.pump.describe().result(WAIT)

    def wait_for_turn(self) -> None:
        """Until the pump has done all that it was doing, or has ended."""
        with suppress(CancelledError):
            self.streams()

    def wait(self, condition: Callable[[Streams], bool], what: str) -> None:
        """Until it is so, as the pump says."""
        wait_until(lambda: condition(self.streams()), what)

    def settle(self) -> None:
        """Until the pump has read all that the VM and the clients sent."""
        wait_until(lambda: unread_by_peer(self.io) == 0, "the VM is read")
        self.streams()

    def wait_ended(self) -> None:
        assert self.owner.over.wait(WAIT)
        assert self.pump.join(WAIT)

    def close(self) -> None:
        super().close()
        self.pump.abort()
        assert self.pump.join(WAIT) or not self._started


@contextmanager
def running(threads: list[threading.Thread]) -> Iterator[None]:
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)


def read_frames(sock: socket.socket, count: int) -> list[Frame]:
    frames = []
    for _ in range(count):
        seq, length = FRAME.unpack(read_exact(sock, FRAME.size))
        frames.append(Frame(seq, read_exact(sock, length - FRAME.size)))
    return frames


class CellKeeper:
    """Keeps cells, which tests read."""

    def __init__(self) -> None:
        self.cells: list[memoryview] = []

    def keep(self, record: Record, memory: int = -1, words: Sequence[int] = ()) -> Slot:
        self.cells.append(memoryview(bytearray(CELL_SIZE)).cast("Q"))
        release = (lambda _number: os.close(memory)) if memory >= 0 else None
        return Slot(len(self.cells), self.cells[-1], release)

    def new_memory(self, size: int) -> int:
        fd = os.memfd_create("test")
        os.ftruncate(fd, size)
        return fd
