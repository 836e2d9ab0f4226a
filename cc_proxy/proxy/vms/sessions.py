"""Making the sessions of a VM: new ones, and those of the previous process."""

import contextlib
import socket
from collections.abc import Callable

from cc_proxy.continuity.cells import NO_CELL, SESSION_WORDS
from cc_proxy.continuity.memory import BUFFER_SIZE
from cc_proxy.continuity.state.streams import SessionState
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.linux.fds import check_passable, refuse_rights
from cc_proxy.proxy.streams.interfaces import Place
from cc_proxy.proxy.streams.session import Session, Whose
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from cc_proxy.proxy.users import Charge, User
from cc_proxy.proxy.vms.kept import KeptVm
from cc_proxy.proxy.vms.states import Life, VmError
from cc_proxy.settings import LiveSettings


def session_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a session's socket pair, ours and then the client's. Raises `VmError`."""
    with contextlib.ExitStack() as undo:
        try:
            pair = socket.socketpair()
            for end in pair:
                undo.enter_context(end)
            refuse_rights(pair[0])
            for end in pair:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)  # room for a whole batch
            check_passable(*pair)
        except OSError as error:
            raise VmError(f"the daemon is short of resources: {error.strerror}") from None
        undo.pop_all()
    return pair


class Sessions:
    """Makes the sessions of one VM. Any thread."""

    def __init__(self, vm: str, life: Life, kept: KeptVm, space: SpoolSpace, live: LiveSettings) -> None:
        self._vm = vm
        self._life = life
        self._kept = kept
        self._space = space
        self._live = live

    def open(
        self, n_streams: int, user: User, pid: int, add: Callable[[Session], bool]
    ) -> tuple[int, socket.socket]:
        """Make a session, `add` it to the VM's pump, and return its first seq and the client's end.

        `add` returns False if the pump has ended. Raises `VmError` or `LimitReached`; nothing is left open
        then, and unless the VM has gone, no seq is used up.
        """
        with contextlib.ExitStack() as undo:
            ours, theirs = map(undo.enter_context, session_pair())
            charge = undo.enter_context(user.charge("sessions"))
            seqs = self._life.take_seqs(n_streams)
            window = self._live.current.stdin.window
            paced = StdinWindow(seqs.start, window) if window else None
            session = self._make(seqs, ours, user.uid, pid, paced, charge)
            if not add(session):
                session.close()
                raise VmError(self._life.why_gone)
            undo.pop_all()  # now they are the pump's
        return seqs.start, theirs

    def _make(
        self, seqs: range, sock: socket.socket, uid: int, pid: int, window: StdinWindow | None, charge: Charge
    ) -> Session:
        """Return a session that is kept, and that its user is charged for, until it closes."""
        whose = Whose(self._vm, uid, pid)
        slot = self._kept.keep_session(seqs, sock.fileno(), whose)

        def on_close() -> None:
            self._kept.release_session(seqs, slot)
            charge.give_back()

        place = Place(on_close, slot.cell[:SESSION_WORDS] if slot.number else NO_CELL)
        try:
            return Session(seqs, sock, whose, Spool(self._space, uid), window, place)
        except BaseException:
            self._kept.release_session(seqs, slot)
            raise

    def restore(self, state: SessionState, user: User) -> Session:
        """Return a session that goes on where that of the previous process stood."""
        seqs = range(state.first_seq, state.first_seq + state.seqs)
        window = StdinWindow.from_state(seqs.start, state.window) if state.window else None
        sock = socket.socket(fileno=state.fd.number)
        session = self._make(seqs, sock, state.uid, state.pid, window, user.charge_again("sessions"))
        session.restore(state)
        return session
