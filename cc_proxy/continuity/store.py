"""The service manager's store: the manager keeps fds, and starts another process when this one has ended."""

import contextlib
import mmap
import os
import select
import socket
from collections.abc import Mapping, Sequence

from cc_proxy.continuity.box import Box, close_all
from cc_proxy.continuity.format import DaemonRecord
from cc_proxy.continuity.heirs import NotReplaced
from cc_proxy.continuity.keeper import NOTHING, Keeper, TableKeeper
from cc_proxy.continuity.table import SIZE, Table
from cc_proxy.linux.fds import Identity
from cc_proxy.linux.systemd import Notifier, take_stored
from cc_proxy.log.levels import logger

#: How the names of stored fds begin, in any version; and the names of the box's two ends, of the table, and
#: of the witness, a socket that shows whether the manager keeps what it was given.
_OURS = "cc-proxy-"
_BOX, _TABLE, _WITNESS = f"{_OURS}box", f"{_OURS}table", f"{_OURS}witness"
_MOST_KEPT = 4


class Store:
    """What the manager keeps: the box and the table. Main thread, except for the keeper."""

    #: With this status, the unit has another process started.
    exit_status = os.EX_TEMPFAIL

    def __init__(self, notifier: Notifier) -> None:
        """Take what was kept for this process."""
        self._notifier = notifier
        self._witness: socket.socket | None = None  # its peer is kept, or has hung up
        self._keeper: TableKeeper | None = None
        #: Why nothing can be kept; empty if it can.
        self.error = ""
        #: Why what was left here is lost; empty if it is not.
        self.lost = ""
        stored = take_stored(_OURS)
        ends = [socket.socket(fileno=fd) for fd in stored.pop(_BOX, [])]
        tables = stored.pop(_TABLE, [])
        #: None if there is none.
        self.box: Box | None = None
        self.memory: mmap.mmap | None = None
        if len(ends) == 2 and len(tables) == 1:  # noqa: PLR2004 - a pair
            try:
                self.memory = mmap.mmap(tables[0], SIZE)
                self.box = Box(ends)
            except ValueError:
                self.lost = "the table is of another version: it is shorter"
        elif ends or tables:
            self.lost = "the service manager has dropped a part of it"
        if self.lost:
            for end in ends:
                _empty(end)
            stored |= {_BOX: [], _TABLE: []}
        for name, fds in stored.items():  # the witness, and what belongs to another version
            notifier.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
            close_all(fds)
        close_all(tables)

    def open(self) -> Keeper:
        """Return a keeper. If the manager keeps nothing, neither does that, and `error` says why.

        What was found in the store stays there until the keeper takes over.
        """
        try:
            self._have_kept()
        except OSError as error:
            self.error = str(error)
        if self.error:
            self.forget()
            return NOTHING
        assert self.box
        assert self.memory
        self._keeper = TableKeeper(Table(self.memory), self.box)
        return self._keeper

    def _have_kept(self) -> None:
        """Have the manager keep box and table; `error` says why if it does not. Raises `OSError`."""
        self.error = ""
        if self._witness:
            self._witness.close()
        if not self.box:
            self.box = Box()
            self._tell(_BOX, [end.fileno() for end in self.box.ends])
            with open(os.memfd_create(_TABLE), "r+b", buffering=0) as file:
                file.truncate(SIZE)
                self.memory = mmap.mmap(file.fileno(), SIZE)
                self._tell(_TABLE, [file.fileno()])
        self._notifier.tell("FDSTOREREMOVE=1", f"FDNAME={_WITNESS}")
        self._witness, theirs = socket.socketpair()
        with theirs:
            if not self._notifier.store(_WITNESS, [theirs.fileno()]):
                self.error = self._notifier.error or "it does not answer"
        if not self.error and not self._is_kept:
            self.error = f"it keeps no fds: set FileDescriptorStoreMax= to {_MOST_KEPT} at least"

    def _tell(self, name: str, fds: Sequence[int]) -> None:
        self._notifier.tell("FDSTORE=1", f"FDNAME={name}", fds=fds)

    @property
    def _is_kept(self) -> bool:
        """Whether the manager keeps the witness, which was the last thing that it was given."""
        if not self._witness:
            return False
        poll = select.poll()
        poll.register(self._witness, 0)
        return not poll.poll(0)

    def prepare(self) -> None:
        """Check that everything is kept. Raises `NotReplaced`."""
        if self.error or not self._keeper or not self._is_kept:
            raise NotReplaced(f"the service manager keeps nothing: {self.error or 'it has dropped the box'}")

    def hand_over(self, data: bytes, fds: Mapping[int, Identity]) -> None:
        """Leave everything in the store. Raises `NotReplaced`."""
        self.prepare()
        assert self._keeper
        try:
            self._keeper.hand_over(data, fds)
        except OSError as error:
            raise NotReplaced(f"the fds cannot be handed over: {error.strerror}") from None

    def take_over(self, daemon: DaemonRecord) -> str:
        """Have the next process find what this one keeps. Returns why that fails; empty if it does not."""
        if self._keeper:
            try:
                self._keeper.take_over(daemon)
            except (OSError, ValueError) as error:
                self.error = str(error)
                self.forget()
        return self.error

    def keep_daemon(self, daemon: DaemonRecord, *, is_well: bool) -> None:
        """Keep what is now known of the daemon itself; `is_well` if it has survived what it took over."""
        if self._keeper:
            try:
                self._keeper.set_daemon(daemon, is_well=is_well)
            except (OSError, ValueError) as error:
                logger.warning("a crash would lose what has changed", extra={"error": str(error)})

    def forget(self) -> None:
        """Have the manager keep nothing any more."""
        if self._keeper:
            self._keeper.end()
        elif self.box:  # now, because the manager may take its time
            with contextlib.suppress(OSError):
                self.box.drop(self.box.messages)
        for name in (_BOX, _TABLE, _WITNESS):
            self._notifier.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
        self.let_go()
        self.box = self.memory = self._keeper = None

    def close(self) -> None:
        """Do nothing: if it was not replaced, this process goes on using the store."""

    def let_go(self) -> None:
        """Close this process's fds; the manager keeps its own."""
        if self._keeper:
            self._keeper.close()
        if self.box:
            self.box.close()
        if self._witness:
            self._witness.close()
            self._witness = None


def _empty(end: socket.socket) -> None:
    """Close one end of a box, and at once what is in it: a listening socket would be in the way."""
    with end, contextlib.suppress(OSError):
        while end.recv(1, socket.MSG_DONTWAIT):
            pass
