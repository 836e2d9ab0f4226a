"""The control channel: one transaction at a time, each within a deadline."""

import contextlib
import functools
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from cc_proxy.continuity.state.vms import ControlState
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import ControlMessage, OnAnswer, Quiz
from cc_proxy.proxy.rest import LOOK_UP, Resting
from cc_proxy.proxy.spin import Spin
from cc_proxy.proxy.streams.interfaces import Beside
from cc_proxy.proxy.turns import Turns
from cc_proxy.proxy.vms.commands import (
    Asked,
    OnAnswered,
    Transaction,
    commands_of,
    control_state,
    is_clients,
    transactions_of,
)
from cc_proxy.proxy.vms.control_socket import ControlLost, ControlSocket

#: The most commands without an answer. After that no more are sent.
_MOST_UNANSWERED = 64


class NoAnswer(Exception):
    """The deadline passed; the text says what was waited for."""


class NotSent(NoAnswer):
    """The command was not sent, so there is no answer."""


class ControlLink:
    """A control channel, and the turns that threads take on it.

    A thread carries out its own command: it writes, then reads until the answer is there. Then it sends the
    next command and passes the turn on, so the agent is at work while the next thread wakes up.

    Between commands no thread waits for the agent. Then `fileno` is readable when the agent has said
    something or hung up, and the pump calls `read`.
    """

    def __init__(self, sock: socket.socket, on_event: Callable[[ControlMessage], None]) -> None:
        """`on_event` is called with each message of the agent that answers no command."""
        # Only the thread that has the turn uses these three, except for what any thread may call on _sock.
        self._sock = ControlSocket(sock, on_event)
        self._channel = self._sock.channel
        self._spin = Spin()
        self._turns = Turns[Transaction](functools.partial(self._sock.watch, True))
        # By client. The client's thread adds and removes its own, which is atomic under the GIL.
        self._waiting: dict[int, Transaction] = {}
        self._is_to_close = False  # `close` was called while threads came to rest

    # Between two processes --------------------------------------------------------------------------------

    def rest(self) -> None:
        """Have every thread that waits here raise `Resting`; its command stays. Any thread."""
        self._turns.rest()

    def hand_over(self) -> ControlState | None:
        """Give up the socket and all that waits as a value; None if the channel is closed. After `rest`.

        Nobody may use the channel any more.
        """
        if self._sock.is_closed or self._is_to_close:
            self._sock.close()
            return None
        return control_state(self._sock.give_up(), self._channel, self._waiting)

    @classmethod
    def from_state(
        cls,
        state: ControlState,
        on_event: Callable[[ControlMessage], None],
        on_answered: OnAnswered,
    ) -> Self:
        """Return a link that goes on where another one stood. Raises `OSError`."""
        link = cls(socket.socket(fileno=state.fd.number), on_event)
        commands = commands_of(state, on_answered)
        link._channel.restore(state.channel, commands)
        link._waiting = transactions_of(state, on_answered, commands)
        link._turns.restore(link._waiting.values())
        if state.channel.is_up:
            link._sock.watch(True)
        return link

    def find_out(self) -> None:
        """Ask the agent questions (`Quiz`) if it is not known which of its answers are still to come.

        That is so after a crash. Commands wait until the questions are answered. Call this before anything
        else uses the channel.
        """
        if not self._channel.is_up and not self._channel.is_quizzed:
            self._channel.ask(Quiz())
        self._sock.watch(True)

    def _is_sure(self) -> bool:
        """Whether it is known which commands have no answer yet."""
        return self._channel.is_up or not self._channel.is_quizzed

    @property
    def fd(self) -> int:
        """The channel's own fd."""
        return self._sock.sock.fileno()

    def keep(self, cell: memoryview) -> None:
        """Store how far messages have come in two words (`ControlSocket.keep`). Requires the turn."""
        self._sock.keep(cell)

    # Any thread -------------------------------------------------------------------------------------------

    def wait_until_up(
        self,
        io: socket.socket,
        timeout: float,
        ping_after: float,
        console: Beside | None = None,
        still_wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Wait for READY; returns whether it came. Call this before anything else uses the channel.

        After `ping_after` seconds without it, the agent is asked questions (`Quiz`): one that answers them
        was up before. `console` is read meanwhile. Raises `NoAnswer`, or `ControlLost`, also if the VM hangs
        up `io` or `still_wanted` returns false.
        """
        begun = time.monotonic()
        up = select.poll()
        up.register(self._sock.sock, select.POLLIN)
        up.register(io, 0)
        if console:
            up.register(console, select.POLLIN)
        while not self._is_up():
            now = time.monotonic() - begun
            if now >= timeout:
                self._sock.read_what_is_there()  # READY may have come in time, while this process was stopped
                if self._is_up():
                    break
                raise NoAnswer("no READY from the VM")
            if not self._channel.is_quizzed and now >= ping_after:
                self._channel.ask(Quiz())
            if not still_wanted():
                raise ControlLost("nobody waits for it any more")
            until = timeout if self._channel.is_quizzed else min(ping_after, timeout)
            self._sock.exchange_when_ready(up, min(until - now, LOOK_UP))
            ready = dict(up.poll(0))
            if io.fileno() in ready:
                raise ControlLost("the VM hung up its I/O channel")
            if console and console.fileno() in ready and not console.read():
                up.unregister(console)
        self._sock.watch(True)
        return self._channel.ready

    def _is_up(self) -> bool:
        return self._channel.is_up

    def transact(self, asked: Asked, payload: bytes, timeout: float, client: int = 0) -> ControlMessage:
        """Send a command and return its ACK or ERROR. `asked` is called with it too, however late it comes.

        `timeout` is in seconds and includes waiting for the commands of others. Raises `NoAnswer` (the agent
        may yet carry out the command, and its answer is not mistaken for another's) or `ControlLost`. If it
        raises `Resting`, the command stays, and the same `client` has to call this again. A client has one
        command at a time.
        """
        client = client or -threading.get_ident()
        transaction = self._waiting.get(client)
        if transaction is None:
            transaction = self._waiting[client] = Transaction(asked.code, payload, time.monotonic(), asked)
        try:
            answer = self._transact(transaction, timeout)
        except Resting:
            raise
        except BaseException:
            del self._waiting[client]
            raise
        del self._waiting[client]
        return answer

    def is_waited_for_by(self, client: int) -> bool:
        """Whether a command of this client stays here after `Resting`."""
        return client in self._waiting

    def post(self, code: Code, on_answer: OnAnswer, on_refusal: Callable[[], None]) -> None:
        """Send a command that no thread waits for, when its turn comes.

        `on_answer` is called by the thread that happens to read the answer, and never if the channel is lost.
        `on_refusal` is called if too many commands are without an answer.
        """
        if self._turns.join(Transaction(code, b"", 0.0, on_answer, on_refusal)):
            self._pass_turn()

    def acknowledge(self, pings: int, done: Callable[[bool], None]) -> None:
        """Have the agent answer some pings, one at a time, so that no command waits for more than one.

        `done` is called with whether it answered all, by any thread, and never if the channel is lost.
        """

        def answered(_answer: ControlMessage) -> None:
            if pings > 1:
                self.acknowledge(pings - 1, done)
            else:
                done(True)

        self.post(Code.PING, answered, functools.partial(done, False))

    def waiting(self) -> list[tuple[Code, float]]:
        """Return the commands that threads wait for, and since when (`time.monotonic`), the oldest first."""
        return [(transaction.code, transaction.begun) for transaction in list(self._waiting.values())]

    @property
    def unanswered(self) -> int:
        """How many commands of clients have no answer, including those no longer waited for. A snapshot."""
        return sum(map(is_clients, self._channel.commands))

    def _transact(self, transaction: Transaction, timeout: float) -> ControlMessage:
        deadline = transaction.begun + timeout
        if not self._turns.get(transaction, deadline):
            raise NotSent(f"no answer in {timeout:g} s: another command was in the way all the time")
        try:
            if self._turns.resting:
                raise Resting
            self._sock.watch(False)
            if transaction.command is None:
                if not self._is_sure():
                    try:
                        self._await(self._is_sure, deadline, timeout)
                    except NoAnswer as error:
                        raise NotSent(str(error)) from None
                self._send(transaction)
            assert transaction.command
            self._await(transaction.command.is_answered, deadline, timeout)
            assert transaction.command.answer
            return transaction.command.answer
        finally:
            self._pass_turn()

    def hang_up(self, cause: str = "") -> None:
        """Hang up: every thread that waits finds the channel lost, with this cause if one is given."""
        self._sock.hang_up(cause)

    def _pass_turn(self) -> None:
        """Send the next command, and let the thread that waits for it go on. Requires the turn."""
        while transaction := self._turns.next():
            with contextlib.suppress(ControlLost, NotSent):  # its own thread finds out why
                if transaction.command is None and self._is_sure():
                    self._send(transaction)
            if transaction.on_refusal is None:
                self._sock.watch(False)  # it still is watched if the pump passes the turn on
                transaction.turn.release()
                return
            if transaction.command is None:
                transaction.on_refusal()

    # Pump thread ------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when `read` has something to do."""
        return self._sock.fileno()

    def read(self) -> bool:
        """Handle what came between commands; returns True, as more may come. Raises `ControlLost`."""
        if not self._turns.take():
            self._sock.check()
            return True
        try:
            if self._channel.outgoing:
                self._sock.write()
            self._sock.look()
        finally:
            self._pass_turn()
        return True

    def close(self) -> None:
        """Close the socket, after the threads that use it have found it lost."""
        self.hang_up()
        try:
            self._turns.get(Transaction(Code.PING, b"", 0.0), threading.TIMEOUT_MAX)
        except Resting:
            self._is_to_close = True  # `hand_over` closes it; until then, threads may still use it
            return
        self._sock.close()
        self._pass_turn()

    # Requires the turn ------------------------------------------------------------------------------------

    def _send(self, transaction: Transaction) -> None:
        """Send a transaction's command, or begin to. Raises `ControlLost` or `NotSent`."""
        if self._sock.is_closed:
            raise ControlLost("its control channel is closed")
        if self._channel.unanswered >= _MOST_UNANSWERED:
            raise NotSent(f"not sent: the VM has left {self._channel.unanswered} commands unanswered")
        transaction.command = self._channel.send(transaction.code, transaction.payload, transaction.on_answer)
        self._sock.write()

    def _await(self, done: Callable[[], bool], deadline: float, timeout: float) -> None:
        """Read until something has come. Raises `NoAnswer` or `ControlLost`."""
        now = time.monotonic()
        late = False
        while not done():
            if late:
                raise NoAnswer(f"no answer from the VM in {timeout:g} s")
            if self._turns.resting:
                raise Resting
            late = now >= deadline
            try:
                if late:
                    self._sock.read_what_is_there()
                else:
                    left = min(deadline - now, LOOK_UP)
                    self._spin.wait(self._sock.look, functools.partial(self._sock.exchange, left))
            except ControlLost as lost:
                if not done():
                    raise
                # The answer came first. The next transaction finds the channel lost.
                self._sock.lose(lost)
            now = time.monotonic()
