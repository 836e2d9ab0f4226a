"""Which session owns which stream. The thread that drives the channel does everything here."""

from collections.abc import Callable

from cc_proxy.proxy.streams.session import Session


class Routes:
    """The sessions by seq, and whether their processes have been started.

    An agent answers a frame that no process owns with an empty one, which is not end of file. So stdin waits
    until the agent has acknowledged the process (docs/protocol.md, 3). Output has an owner earlier, from the
    moment the command that starts it is sent: a quick process has ended by the time of the acknowledgement.
    """

    def __init__(self, on_start: Callable[[Session], None]) -> None:
        """`on_start` is called once with each session whose process has been started."""
        self._on_start = on_start
        #: The session that gets the frames of a seq.
        self.owners: dict[int, Session] = {}
        #: Sessions by their stdio, while no process is known to be on it.
        self.silent: dict[int, Session] = {}

    def add(self, session: Session) -> None:
        """Take over a session."""
        stdio, *others = session.seqs
        self.silent[stdio] = session
        self.owners.update(dict.fromkeys(others, session))

    def expect(self, seq: int) -> None:
        """A process may be on this stdio from now on. No session need own it."""
        session = self.silent.pop(seq, None)
        if session:
            self.owners[seq] = session
            session.expect()

    def start(self, seq: int) -> None:
        """A process is on this stdio. Does nothing if that is known."""
        self.expect(seq)
        session = self.owners.get(seq)
        if session and seq == session.seqs.start and not session.is_started:
            session.start()
            self._on_start(session)

    def remove(self, session: Session) -> None:
        """Forget a session that is about to be closed."""
        for seq in session.seqs:
            self.owners.pop(seq, None)
            self.silent.pop(seq, None)
