"""What the thread that drives a channel waits for."""

import contextlib
from collections.abc import Callable

from cc_proxy.linux.selector import NOTHING_ELSE, READ, Selector
from cc_proxy.log import faults
from cc_proxy.proxy.spin import Spin
from cc_proxy.proxy.streams.interfaces import Beside

#: An fd, and what it is ready for.
Ready = tuple[int, int]
Handler = Callable[[int], None]


class Watch:
    """Two epoll instances, and the handlers of their fds.

    `clients` watches the clients, the I/O channel, and the other instance as one more fd. The thread waits on
    it, or on `others` alone while clients cannot be read. The I/O channel is in both, because waking through
    one instance inside the other takes longer.
    """

    def __init__(self, on_writable: Callable[[int], None]) -> None:
        """`on_writable` is called with the fd of a client that takes output again, or has gone.

        Raises `OSError`.
        """
        self._on_writable = on_writable
        self._handlers: dict[int, Handler] = {}
        self._console: Beside | None = None
        self.others = Selector()
        with contextlib.ExitStack() as undo:
            undo.callback(self.others.close)
            self.clients = Selector()
            undo.callback(self.clients.close)
            self.clients.add(self.others.fileno(), READ)
            undo.pop_all()
        self._io_fd = -1
        self._io_events = (READ, NOTHING_ELSE)
        # Measured: an echo takes 40 us if the thread polls for the next frame before it sleeps, and 75 us if
        # it has to be woken.
        self._spin = Spin()
        self._handlers[self.others.fileno()] = lambda _events: self.serve_others(self.others.poll(0))

    def add(self, fd: int, handler: Handler) -> None:
        """Have `handler` called, with the events, when `fd` is readable or has hung up."""
        self._handlers[fd] = handler
        self.others.add(fd, READ)

    def add_io(self, fd: int, handler: Handler) -> None:
        """The same for the I/O channel."""
        self._io_fd = fd
        self._handlers[fd] = handler
        self.others.add(fd, NOTHING_ELSE)
        self.clients.add(fd, READ)

    def add_console(self, console: Beside, vm: str) -> None:
        """Read the console whenever something has come, and close it at its end."""
        self._console = console

        def on_readable(_events: int) -> None:
            try:
                goes_on = console.read()
            except Exception:  # whatever it is, the VM's streams can do without the console
                faults.note("console failed", vm=vm)
                goes_on = False
            if not goes_on:
                self.close_console()

        self.add(console.fileno(), on_readable)

    def close_console(self) -> None:
        """Close the console, if there is one."""
        console, self._console = self._console, None
        if console:
            self.remove(console.fileno())
            console.close()

    def remove(self, fd: int) -> None:
        """Stop watching `fd`, if it is watched. Call this before it is closed."""
        if self._handlers.pop(fd, None):
            self.others.remove(fd)
            self.clients.remove(fd)

    def set_io(self, reading: int, writing: int) -> None:
        """Watch the I/O channel for `READ` and `WRITE`, or `NOTHING_ELSE` instead of either.

        A hang-up is always noticed.
        """
        if (reading, writing) == self._io_events:
            return
        self._io_events = (reading, writing)
        # While the channel is watched for `WRITE`, the thread waits on `others` alone.
        self.others.change(self._io_fd, reading | writing if writing else NOTHING_ELSE)
        self.clients.change(self._io_fd, reading)

    def wait(self, timeout: float | None, with_clients: bool) -> list[Ready]:
        """Wait `timeout` seconds (None: for ever) and return what is ready."""
        if not with_clients:
            return self.others.poll(timeout)
        poll = self.clients.poll
        return self._spin.wait(lambda: poll(0) or None, lambda: poll(timeout))

    def serve(self, ready: list[Ready]) -> list[Ready]:
        """Call the handlers of what is ready; returns the rest, which are sessions' fds."""
        unhandled = []
        for pair in ready:
            # Looked up only now, since one handler may remove another.
            handler = self._handlers.get(pair[0])
            if handler:
                handler(pair[1])
            else:
                unhandled.append(pair)
        return unhandled

    def serve_others(self, ready: list[Ready]) -> None:
        """Handle what was ready in `others`: there a session's fd means that its client takes output."""
        for fd, _ in self.serve(ready):
            self._on_writable(fd)

    def close(self) -> None:
        """Close both instances. What they watched stays open, also the console."""
        self._handlers.clear()  # breaks a reference cycle
        self.others.close()
        self.clients.close()
