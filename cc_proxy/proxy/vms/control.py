"""The control channel's socket: one transaction at a time, each within a deadline."""

import contextlib
import errno
import functools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import Command, ControlChannel, ControlMessage
from cc_proxy.proxy.spin import Eager

#: So many commands may be without an answer, their senders having given up, before no more are sent.
_MOST_UNANSWERED = 64
#: Answers are short; and while events are taken apart nobody else runs. Of one long message more is read.
_READ_SIZE = 512
_LONG_READ = 64 * 1024
#: So many reads empty a socket's buffer, and an agent that never stops talking gets no more.
_MOST_LAST_READS = 512
_TIMEVAL = struct.Struct("@ll")


class ControlLost(Exception):
    """The control channel is of no use any more; the text is the cause."""


class NoAnswer(Exception):
    """The deadline passed; the text says what was waited for."""


class NotSent(NoAnswer):
    """There is no answer because the command was not sent."""


class ControlLink:
    """Owner of the control channel's socket.

    A command is carried out by the thread that asks for it: it writes, then reads until the answer is there.
    Between commands nobody reads, so `unasked` (an epoll instance with the socket in it) becomes readable
    when the agent has said something or hung up; the pump then calls `read_unasked`.

    Lock order: nothing else is locked while `_turn` is held, and it is held over I/O; only transactions of
    this VM wait for it.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_read: Callable[[int, list[ControlMessage]], None],
        due: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`on_read` is told the bytes and the events of each read, `due` how long to rest before the next."""
        self._turn = threading.Lock()  # guards _channel, _lost, and reading and writing _sock
        self._sock = sock
        self._on_read = on_read
        self._due = due
        self._channel = ControlChannel()
        self._lost: ControlLost | None = None
        self._end = "the VM hung up its control channel"  # what that is called; set once at the most
        self._over = threading.Event()  # nobody rests any more: others wait for the end
        # Commands and since when, by the thread that waits for them. Each thread adds and removes its own:
        # single steps of the interpreter, which need no lock.
        self._waiting: dict[int, tuple[Code, float]] = {}
        self._receive_ticks = 0
        self._eager = Eager()
        self._unasked = select.epoll()
        self._unasked.register(sock, 0)

    # Any thread -------------------------------------------------------------------------------------------

    def wait_until_up(
        self, io: socket.socket, timeout: float, ping_after: float, left: float | None = None
    ) -> None:
        """Wait for READY; after `ping_after` seconds without it, take an answered ping in its place.

        `left` is what is left of `timeout`, if connecting took some of it. `io` is watched meanwhile: a VM
        that hangs up there is lost too. Raises `ControlLost` or `NoAnswer`.
        """
        left = timeout if left is None else left
        begun = time.monotonic()
        with self._turn:
            up = select.poll()
            up.register(self._sock, select.POLLIN)
            up.register(io, 0)
            ping = None
            while not (self._channel.ready or (ping and ping.answer)):
                now = time.monotonic() - begun
                if now >= left:
                    # If this process was stopped, it may have come in time.
                    self._read_what_is_there()
                    if self._channel.ready or (ping and ping.answer):
                        break
                    raise NoAnswer(f"no READY from the VM in {timeout:g} s")
                if ping is None and now >= ping_after:
                    ping = self._channel.send(Code.PING, b"{}")
                until = left if ping or ping_after > left else ping_after
                self._exchange_when_ready(up, until - now)
                if io.fileno() in dict(up.poll(0)):
                    raise ControlLost("the VM hung up its I/O channel")
                if not self._channel.ready:
                    self._rest()
            self._unasked.modify(self._sock, select.EPOLLIN)

    def transact(self, code: Code, payload: bytes, timeout: float) -> ControlMessage:
        """Send a command and return its ACK or ERROR.

        `timeout` is in seconds and includes waiting for the commands of others. Raises `NoAnswer` (the
        command may yet be carried out; its answer will be taken for its own) or `ControlLost`.
        """
        begun = time.monotonic()
        thread = threading.get_ident()
        self._waiting[thread] = code, begun
        try:
            return self._transact(code, payload, begun + timeout, timeout)
        finally:
            del self._waiting[thread]

    def waiting(self) -> list[tuple[Code, float]]:
        """Return the commands that are waited for, and since when (`time.monotonic`), the oldest first."""
        return list(self._waiting.values())

    @property
    def unanswered(self) -> int:
        """How many commands the agent has not answered, given-up ones included, at some moment."""
        return self._channel.unanswered

    def _transact(self, code: Code, payload: bytes, deadline: float, timeout: float) -> ControlMessage:
        if not self._turn.acquire(timeout=timeout):
            raise NotSent(f"no answer in {timeout:g} s: another command was in the way all the time")
        try:
            if self._unasked.closed:
                raise ControlLost("its control channel is closed")
            if self._channel.unanswered >= _MOST_UNANSWERED:
                raise NotSent(f"not sent: the VM has left {self._channel.unanswered} commands unanswered")
            self._unasked.modify(self._sock, 0)
            command = self._channel.send(code, payload)
            self._write()
            self._await(command, deadline, timeout)
            assert command.answer
            return command.answer
        finally:
            if not self._unasked.closed:
                self._unasked.modify(self._sock, select.EPOLLIN)
            self._turn.release()

    def hang_up(self, cause: str = "") -> None:
        """Make everybody who waits on this channel find it lost, for this cause if there is one.

        The socket stays open until `close`.
        """
        self._end = cause or self._end
        self._over.set()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    # Pump thread ------------------------------------------------------------------------------------------

    @property
    def unasked(self) -> select.epoll:
        """Readable when `read_unasked` has something to do."""
        return self._unasked

    def read_unasked(self) -> None:
        """Note the events that came between commands. Raises `ControlLost`; never waits."""
        if not self._turn.acquire(blocking=False):
            if self._hung_up():
                raise ControlLost(self._end)
            return
        try:
            with contextlib.suppress(BlockingIOError):
                self._read(socket.MSG_DONTWAIT)
        finally:
            self._turn.release()

    def close(self) -> None:
        """Close the socket, once those who were using it have found it lost."""
        self.hang_up()
        with self._turn:
            self._unasked.close()
            self._sock.close()

    # Requires holding _turn -------------------------------------------------------------------------------

    def _exchange(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the agent and read once; returns whether it said something."""
        if self._channel.outgoing:
            ready = select.poll()
            ready.register(self._sock)
            return self._exchange_when_ready(ready, timeout)
        # One call that waits and reads: this is where most of the time of a command goes.
        self._limit_receive(timeout)
        return self._has_read(0)

    def _exchange_when_ready(self, ready: select.poll, timeout: float) -> bool:
        if self._channel.outgoing:
            self._write()
        ready.modify(self._sock, select.POLLIN | (select.POLLOUT if self._channel.outgoing else 0))
        return bool(ready.poll(int(timeout * 1000) + 1)) and self._has_read(socket.MSG_DONTWAIT)

    def _limit_receive(self, timeout: float) -> None:
        """Have recv(2) wait `timeout` seconds at the most, rounded up to a hundredth."""
        ticks = int(timeout * 100) + 1
        if ticks != self._receive_ticks:
            self._receive_ticks = ticks
            until = _TIMEVAL.pack(ticks // 100, ticks % 100 * 10_000)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, until)

    def _await(self, command: Command, deadline: float, timeout: float) -> None:
        """Wait for the answer."""
        now = time.monotonic()
        late = False
        while not command.is_answered():
            if late:
                raise NoAnswer(f"no answer from the VM in {timeout:g} s")
            late = now >= deadline
            try:
                if late:
                    self._read_what_is_there()
                else:
                    self._eager.wait(self._look, functools.partial(self._exchange, deadline - now))
            except ControlLost as lost:
                if not command.is_answered():
                    raise
                # The answer was in front of what ended the channel: that is for whoever comes next.
                self._lost = lost
                self.hang_up()
            if not (late or command.is_answered()):
                self._rest()
            now = time.monotonic()

    def _look(self) -> bool | None:
        """Read once; None if there is nothing yet."""
        return self._has_read(socket.MSG_DONTWAIT) or None

    def _read_what_is_there(self) -> None:
        """What came in time counts, though it stands behind events."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_LAST_READS):
                self._read(socket.MSG_DONTWAIT)

    def _write(self) -> None:
        outgoing = self._channel.outgoing
        try:
            del outgoing[: self._sock.send(outgoing, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return
        except OSError as error:
            raise ControlLost(f"control channel: {os.strerror(error.errno or 0)}") from None

    def _has_read(self, flags: int) -> bool:
        try:
            self._read(flags)
        except BlockingIOError:
            return False
        return True

    def _rest(self) -> None:
        """Leave the interpreter to others before there is more to read; not while they wait for the end."""
        while (seconds := self._due()) and not self._over.wait(seconds):
            pass

    def _read(self, flags: int) -> None:
        size = max(_READ_SIZE, min(self._channel.missing, _LONG_READ))
        try:
            data = self._sock.recv(size, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ControlLost(f"control channel: {os.strerror(error.errno or 0)}") from None
        if self._lost:
            raise self._lost
        if not data:
            raise ControlLost(self._end)
        self._on_read(len(data), self._channel.receive_data(data))
        if self._channel.error:
            raise ControlLost(f"control channel: {self._channel.error}")

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))
