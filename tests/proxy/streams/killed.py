"""A process that drives a channel until somebody kills it: `python -m tests.proxy.streams.killed`.

It gets one line of JSON on its standard input, and says in one line what it has regained.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from cc_proxy.continuity.cells import SESSION_WORDS, VM_WORDS, Cell
from cc_proxy.continuity.memory import Memory, shared_memory
from cc_proxy.continuity.regain import ChannelFacts, SessionFacts, regain
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.streams.channel import Channel
from cc_proxy.proxy.streams.interfaces import Pacing, Place, Sockets
from cc_proxy.proxy.streams.mailbox import Mailbox
from cc_proxy.proxy.streams.session import Session, Whose
from cc_proxy.proxy.streams.spool import Spool, SpoolSpace
from cc_proxy.settings import LiveSettings, Settings, SpoolSettings


class Owner:
    container_id = "vm"

    def lose(self, cause: str) -> None:
        print(cause, file=sys.stderr)

    def ended(self) -> None:
        pass


class Quiet:
    """A control channel on which nothing comes."""

    def __init__(self) -> None:
        self._end, self._other = socket.socketpair()

    def fileno(self) -> int:
        return self._end.fileno()

    def read(self) -> bool:
        return False

    def close(self) -> None:
        self._end.close()
        self._other.close()


class Mortal(socket.socket):
    """A socket at which the process ends: just before a call of one of its methods, or just behind it."""

    def __init__(self, fd: int, end: tuple[str, int, bool] | None) -> None:
        """`end` is the method, which of its calls it is, and whether that call is made first."""
        super().__init__(fileno=os.dup(fd))
        self._method, self._left, self._is_done = end or ("", 0, False)

    def recv_into(self, *args: Any) -> int:
        return self._call("recv_into", super().recv_into, *args)

    def send(self, *args: Any) -> int:
        return self._call("send", super().send, *args)

    def sendmsg(self, *args: Any) -> int:
        return self._call("send", super().sendmsg, *args)

    def _call(self, method: str, call: Callable[..., int], *args: Any) -> int:
        ends = False
        if method == self._method:
            self._left -= 1
            ends = not self._left
        if ends and not self._is_done:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args)
        finally:
            if ends:
                os.kill(os.getpid(), signal.SIGKILL)


def cell(page: mmap.mmap, number: int) -> Cell:
    """The VM's, and behind it those of the sessions."""
    begin = 8 * (VM_WORDS + SESSION_WORDS * (number - 1)) if number else 0
    return memoryview(page)[begin : begin + 8 * (SESSION_WORDS if number else VM_WORDS)].cast("Q")


def memory(fds: list[int]) -> tuple[Memory, mmap.mmap]:
    buffers, cells = fds
    page = mmap.mmap(cells, 64 * 1024)
    return shared_memory(buffers, cell(page, 0)), page


def new_session(
    seqs: range, sock: socket.socket, place: Place, space: SpoolSpace, window: StdinWindow | None
) -> Session:
    who = Whose("vm", os.getuid(), os.getpid())
    return Session(seqs, sock, who, Spool(space, who.uid), window, place)


def main() -> None:
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    space = SpoolSpace(LiveSettings(Settings(spool=SpoolSettings(directory=order["directory"]))))
    where, page = memory(order["memory"])
    places = [Place(lambda: None, cell(page, number + 1)) for number in range(len(order["sessions"]))]
    at_vm, at_client = order["ends"]
    io = Mortal(order["io"], at_vm)
    pacing = Pacing(0.05, lambda _pings, done: done(True))
    mailbox = Mailbox()
    channel = Channel(Owner(), Sockets(io, Quiet(), None), where, mailbox, pacing)
    size = order["window"]
    said: dict[str, Any] = {}
    if order["before"]:
        before, cells = memory(order["before"])
        facts = [
            SessionFacts(Fd(fd), seq, 2, 0, 0, cell(cells, number + 1))
            for number, (seq, fd) in enumerate(order["sessions"])
            if fd >= 0
        ]
        found = regain(ChannelFacts(Fd(order["io"]), before, facts, order["next_seq"], size))
        streams = found.state.streams
        numbers = {seq: number for number, (seq, _) in enumerate(order["sessions"])}
        sessions = []
        for state in streams.sessions:
            window = StdinWindow.from_state(state.first_seq, state.window) if state.window else None
            seqs, place = range(state.first_seq, state.first_seq + 2), places[numbers[state.first_seq]]
            sessions.append(new_session(seqs, Mortal(state.fd.number, at_client), place, space, window))
            sessions[-1].restore(state)
        channel.restore(found.state, sessions)
        said = {
            "gaps": found.gaps,
            "hung_up": [(hung_up.session.first_seq, hung_up.reason) for hung_up in found.hung_up],
            "lost": found.lost,
            "resync": streams.resync is not None,
        }
    else:
        for (seq, fd), place in zip(order["sessions"], places, strict=True):
            window = StdinWindow(seq, size) if size else None
            channel.add(new_session(range(seq, seq + 2), Mortal(fd, at_client), place, space, window))
            channel.open_stdin([seq])
    print(json.dumps(said), flush=True)
    while channel.is_in_use:
        channel.serve(channel.wait())


if __name__ == "__main__":
    main()
