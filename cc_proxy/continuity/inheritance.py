"""What the previous process has left to this one."""

import os
import socket
import time
from collections.abc import Callable

from cc_proxy.continuity import gaps
from cc_proxy.continuity.format import DaemonRecord, DaemonState, decode, decode_settings, find, taking_all
from cc_proxy.continuity.heirs import Heir, Predecessor, Successor
from cc_proxy.continuity.keeper import NOTHING, Keeper
from cc_proxy.continuity.recovery import Losses, recover
from cc_proxy.continuity.store import Store
from cc_proxy.continuity.table import Table, Unreadable
from cc_proxy.linux.fds import close_stream
from cc_proxy.linux.systemd import Notifier
from cc_proxy.log.levels import logger
from cc_proxy.settings import Settings

#: Seconds after which a process is known to survive what it has taken over.
_WELL_AFTER = 10.0
#: Processes in a row that may end sooner. After that, the next one begins with nothing: what they took over
#: must be what ends them, and in the end systemd's start limit would leave no daemon at all.
_MOST_TRIES = 10


class Nothing(Exception):
    """The previous process goes on after all; the text says why."""


class Inheritance:
    """What is in the service manager's store, or comes from the process that started this one. Main thread.

    Nothing is taken out before `take_over`: if this process ends earlier, the next one finds everything.
    """

    def __init__(self, notifier: Notifier, directory: str) -> None:
        """Take the fds that were passed to this process. `directory` is where it was started."""
        self._store = Store(notifier) if notifier.wanted else None
        self._predecessor = Predecessor.find()
        self._directory = directory
        self._state: DaemonState | None = None
        self._losses = Losses()
        self._since = time.monotonic()
        self._describe: Callable[[], DaemonRecord] | None = None
        #: Seconds that it took to read what was left.
        self.reading = 0.0
        #: Why what was left cannot be read; empty if it can.
        self.error = self._store.lost if self._store else ""
        if self._store and self._store.memory:
            self._read(self._look)
            if self.error:
                self._store.forget()  # or its listening socket, for one, would be in the way

    @property
    def settings(self) -> Settings | None:
        """The settings of the previous process; None if it left nothing in the store."""
        return decode_settings(self._state.settings) if self._state else None

    def wait(self) -> DaemonState | None:
        """Return what was left, None if nothing was. Waits for the process that started this one, if any.

        Raises `Nothing` if that process goes on itself.
        """
        if predecessor := self._predecessor:
            try:
                filled = predecessor.wait()
            except OSError as error:
                raise Nothing(str(error)) from None
            if not filled:
                raise Nothing("the previous process has ended, or goes on")
            self._read(lambda: decode(*predecessor.box.look()))
            if self.error:
                raise Nothing(self.error)
        return self._state

    def _read(self, read: Callable[[], DaemonState | None]) -> None:
        begun = time.monotonic()
        try:
            self._state = read()
        except (OSError, Unreadable) as error:
            self.error = str(error)
        except Exception as error:  # whatever it is, the next process would fail in the same way
            self.error = f"it makes no sense: {error!r}"
        self.reading = time.monotonic() - begun

    def _look(self) -> DaemonState | None:
        """Return what is in the store. Raises `OSError` or `Unreadable`."""
        assert self._store
        assert self._store.box
        assert self._store.memory
        table = Table(self._store.memory)
        if table.is_empty:
            return None
        if table.note_try() >= _MOST_TRIES:
            raise Unreadable(f"{_MOST_TRIES} processes have ended within seconds of taking it over")
        data, fds = self._store.box.look()
        if table.is_handed_over:
            return decode(data, fds)
        found = find(fds)
        with taking_all(found):
            state, self._losses = recover(table, found)
        return state

    def keeper(self) -> Keeper:
        """Return what keeps this process's parts. The next process finds them only after `take_over`."""
        return self._store.open() if self._store else NOTHING

    def take_over(self, describe: Callable[[], DaemonRecord]) -> str:
        """Take over what was left. Returns why this process can leave nothing itself; empty if it can.

        `describe` is called now, and by `keep_daemon`, for what is known of the daemon itself. Raises
        `Nothing` if the previous process goes on itself.
        """
        if self._predecessor:
            try:
                self._predecessor.take_over()
            except OSError as error:
                raise Nothing(str(error)) from None
            self._predecessor = None
        self._describe = describe
        for vm, gap in self._losses.gaps:  # before `describe`, whose record has their number
            gaps.note(vm, "stdin" if gap.to_vm else "output", gap.streams, gap.most)
        why_not = self._store.take_over(describe()) if self._store else ""
        _let_go(self._losses)
        self._losses = Losses()
        return why_not

    def keep_daemon(self) -> None:
        """Keep what is now known of the daemon itself."""
        if self._store and self._describe:
            is_well = time.monotonic() - self._since >= _WELL_AFTER
            self._store.keep_daemon(self._describe(), is_well=is_well)

    def end(self) -> None:
        """Leave nothing to a next process: the daemon stops."""
        if self._store:
            self._store.forget()

    def close(self) -> None:
        """Close what this process has of the store."""
        if self._store:
            self._store.let_go()

    def heir(self) -> Heir:
        """Return what goes on after this process."""
        return self._store or Successor(self._directory)


def _let_go(losses: Losses) -> None:
    """Hang up on peers that cannot go on, and close fds that are not needed."""
    for fd, fields in losses.hung_up:
        logger.error("hung up: it cannot go on after a crash", extra=fields)
        close_stream(socket.socket(fileno=fd.number))
    for fd in losses.unused:
        os.close(fd.number)
