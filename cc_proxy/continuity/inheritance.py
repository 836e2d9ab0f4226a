"""What the process before has left to this one."""

import time

from cc_proxy.continuity.box import Box
from cc_proxy.continuity.format import DaemonState, Unreadable, decode, decode_settings
from cc_proxy.continuity.heirs import Heir, Predecessor, Store, Successor, look_into
from cc_proxy.linux.systemd import Notifier
from cc_proxy.settings import Settings


class Nothing(Exception):
    """The process before goes on after all; the text says why."""


class Inheritance:
    """What is in the service manager's store, or comes from the process that has started this one.

    Main thread. Nothing is taken until `take_over`: if this process ends before, the next one finds it all.
    """

    def __init__(self, notifier: Notifier, directory: str) -> None:
        """Take the fds that were passed to this process. `directory` is where it was started."""
        self._store = Store(notifier) if notifier.wanted else None
        self._predecessor = Predecessor.find()
        self._directory = directory
        self._state: DaemonState | None = None
        #: Seconds that it took to read what was left.
        self.reading = 0.0
        #: Why what was left cannot be read; empty if it can.
        self.error = self._store.lost if self._store else ""
        if self._store and self._store.box and not self._store.box.is_empty:
            self._read(self._store.box)
            if self.error:
                self._store.box.empty()  # its listening socket, for one, would be in the way

    @property
    def settings(self) -> Settings | None:
        """The settings that were in force, if they are known before this process has any."""
        return decode_settings(self._state.settings) if self._state else None

    def wait(self) -> DaemonState | None:
        """Return what was left, None if nothing was; waits for a process that has started this one.

        Raises `Nothing` if that goes on itself.
        """
        if self._predecessor:
            try:
                filled = self._predecessor.wait()
            except OSError as error:
                raise Nothing(str(error)) from None
            if not filled:
                raise Nothing("the process before has ended, or goes on")
            self._read(self._predecessor.box)
            if self.error:
                raise Nothing(self.error)
        return self._state

    def _read(self, box: Box) -> None:
        begun = time.monotonic()
        try:
            self._state = decode(*look_into(box))
        except (OSError, Unreadable) as error:
            self.error = str(error)
        self.reading = time.monotonic() - begun

    def take_over(self) -> str:
        """From now on it is this process's. Returns why it can leave nothing to the next one, if it cannot.

        Raises `Nothing`: then it is not.
        """
        if self._predecessor:
            try:
                self._predecessor.take_over()
            except OSError as error:
                raise Nothing(str(error)) from None
            self._predecessor = None
        if self._store:
            self._store.open()
            return self._store.error
        return ""

    def close(self) -> None:
        """Close what this process has of the store."""
        if self._store:
            self._store.close()

    def heir(self) -> Heir:
        """Return who goes on after this process."""
        return self._store or Successor(self._directory)
