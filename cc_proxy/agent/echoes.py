"""When frames on a seq that no process owns are answered. Hosts wait for that before they send more stdin."""

from collections.abc import Callable, Hashable

from cc_proxy.agent.loop import Loop

#: Seconds that a process gets to make room in its full pipe before answers go out all the same.
PATIENCE = 0.1


class Echoes:
    """Sends such answers in their order: at once, or when a process that is about to read has done so.

    A real guest takes milliseconds for an answer, so that a process has read on by then, and hosts rely on
    that. Here it would be microseconds, and whoever begins by loading a large program would lose its stdin.
    """

    def __init__(self, loop: Loop, send: Callable[[int], None], *, drop: int) -> None:
        self._loop = loop
        self._send = send
        self._drop = drop
        self._held: list[int] = []
        #: Processes, each with a token of the time that it is waited for.
        self._waited_for: dict[Hashable, object] = {}

    def answer(self, seq: int) -> None:
        """Send an answer on `seq`, now or later."""
        if self._drop:
            self._drop -= 1
        elif self._waited_for:
            self._held.append(seq)
        else:
            self._send(seq)

    def wait_for(self, process: Hashable) -> None:
        """Hold answers back until `go_on` is called for the same process, but not for long."""
        token = self._waited_for[process] = object()
        self._loop.call_later(PATIENCE, lambda: self._give_up(process, token))

    def go_on(self, process: Hashable) -> None:
        """Hold nothing back for this process any more."""
        self._waited_for.pop(process, None)
        if not self._waited_for:
            held, self._held = self._held, []
            for seq in held:
                self._send(seq)

    def _give_up(self, process: Hashable, token: object) -> None:
        if self._waited_for.get(process) is token:
            self.go_on(process)
