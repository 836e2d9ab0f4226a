"""Making the sessions of a VM: new ones, and those of the process before."""

import contextlib
import socket

from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.linux.fds import check_passable, refuse_rights
from cc_proxy.proxy.streams.interfaces import Place
from cc_proxy.proxy.streams.session import Session, Whose
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from cc_proxy.proxy.streams.state import SessionState
from cc_proxy.proxy.users import User

_SEND_BUFFER = 256 * 1024


def session_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a session's socket pair, ours and then the client's. Raises `OSError`."""
    with contextlib.ExitStack() as undo:
        pair = socket.socketpair()
        for end in pair:
            undo.enter_context(end)
        refuse_rights(pair[0])
        for end in pair:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        check_passable(*pair)
        undo.pop_all()
    return pair


def restored_session(state: SessionState, vm: str, user: User, space: SpoolSpace) -> Session:
    """Return a session that goes on where the one of the process before stood."""
    seqs = range(state.first_seq, state.first_seq + state.seqs)
    window = StdinWindow.from_state(seqs.start, state.window) if state.window else None
    who = Whose(vm, state.uid, state.pid)
    charge = user.charge_again("sessions")
    sock = socket.socket(fileno=state.fd.number)
    session = Session(seqs, sock, who, Spool(space, state.uid), window, Place(charge.give_back))
    session.restore(state)
    return session
