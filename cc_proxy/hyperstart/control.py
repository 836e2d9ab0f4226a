"""The control channel (docs/protocol.md, 2): messages, and which answer belongs to which command. No I/O.

A `ControlChannel` is the state of one connection to an agent. It turns commands into bytes to send. It turns
bytes received into answers, which complete their commands, and unsolicited events.
"""

import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from cc_proxy.hyperstart.codes import Code, describe
from cc_proxy.hyperstart.state import ControlChannelState, ParserState, QuizState

#: Code and total length.
HEADER = struct.Struct(">II")
#: The longest message that hyperstart can take, header included: its receive buffer.
MAX_COMMAND = 10_240
#: The longest message accepted from an agent; the longest ACK: `readfile` is answered with a whole file.
MAX_MESSAGE = 64 * 1024 * 1024
MAX_ACK = 1024 * 1024 * 1024
#: Bytes of a message's payload that are kept.
KEPT_PAYLOAD = 64 * 1024
#: `ControlParser.position` has one of two forms. In a header: how many bytes of it have come (the top byte),
#: and those bytes. In a message: 0xFF (the top byte), and how many bytes have yet to come.
_POSITION_BITS = 56
_IN_MESSAGE = 0xFF << _POSITION_BITS
_ANSWERS = (Code.ACK, Code.ERROR)


class ControlMessage(NamedTuple):
    """A message of either side. In one that was received, `payload` is cut to `KEPT_PAYLOAD` bytes."""

    code: int
    payload: bytes = b""

    def __str__(self) -> str:
        return describe(self.code)


#: Called with a command's ACK or ERROR, however late that comes.
OnAnswer = Callable[[ControlMessage], None]


def ignore(_answer: ControlMessage) -> None:
    """Do nothing about an answer."""


@dataclass(eq=False, slots=True)
class Command:
    """A command that was sent. `answer` is its ACK or ERROR, once that has come."""

    code: Code
    on_answer: OnAnswer = ignore
    answer: ControlMessage | None = field(default=None, init=False)

    def is_answered(self) -> bool:
        """Whether its ACK or ERROR has come."""
        return self.answer is not None

    def take(self, answer: ControlMessage) -> None:
        """Complete the command with its ACK or ERROR."""
        self.answer = answer
        self.on_answer(answer)


def encode(code: int, payload: bytes = b"") -> bytes:
    """Return a whole control message."""
    return HEADER.pack(code, HEADER.size + len(payload)) + payload


class ControlParser:
    """Splits what one side of the channel sends, in whatever pieces it arrives, into messages."""

    def __init__(self) -> None:
        #: Why what was received is no message; nothing after it can be understood.
        self.error: str | None = None
        self._buffer = bytearray()
        # A long message whose kept part has come, and how many bytes of the rest are still to be skipped.
        self._begun: ControlMessage | None = None
        self._skip = 0

    def state(self) -> ParserState:
        """Return what `restore` needs."""
        begun = (self._begun.code, self._begun.payload) if self._begun else None
        return ParserState(bytes(self._buffer), begun, self._skip)

    def restore(self, state: ParserState) -> None:
        """Go on where another parser stood."""
        self._buffer += state.buffer
        self._begun = ControlMessage(*state.begun) if state.begun else None
        self._skip = state.skip

    @property
    def position(self) -> int:
        """Where the parser stands, as a 64-bit number for `state_at`; 0 between messages, or on an error."""
        if self.error is not None:
            return 0
        if self._skip or len(self._buffer) >= HEADER.size:
            return _IN_MESSAGE | self.missing
        return len(self._buffer) << _POSITION_BITS | int.from_bytes(self._buffer, "big")

    def receive_data(self, data: bytes) -> list[ControlMessage]:
        """Take bytes as they arrive, and return the messages they complete.

        A length under 8, or over `MAX_MESSAGE`, or over `MAX_ACK` for an ACK, sets `error`; no more messages
        are returned after that.
        """
        messages = []
        if self.error is None:
            self._buffer += data
            while (message := self._next_message()) is not None:
                messages.append(message)
        return messages

    @property
    def missing(self) -> int:
        """How many bytes of the message that has begun are still to come; 0 if none has begun."""
        if self._skip:
            return self._skip
        if len(self._buffer) < HEADER.size:
            return 0
        _, length = HEADER.unpack_from(self._buffer)
        return int(length) - len(self._buffer)

    def _next_message(self) -> ControlMessage | None:
        message = self._begun or self._begin()
        return self._skip_rest(message) if message and self._skip else message

    def _skip_rest(self, message: ControlMessage) -> ControlMessage | None:
        """Skip the part of a message that is not kept; returns the message once all of it has come."""
        skipped = min(self._skip, len(self._buffer))
        del self._buffer[:skipped]
        self._skip -= skipped
        self._begun = message if self._skip else None
        return None if self._skip else message

    def _begin(self) -> ControlMessage | None:
        """Return the next message once the part of it that is kept has come."""
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return None
        code, length = HEADER.unpack_from(buffer)
        if not HEADER.size <= length <= (MAX_ACK if code == Code.ACK else MAX_MESSAGE):
            self.error = f"{describe(code)} with a total length of {length}"
            return None
        kept = min(length, HEADER.size + KEPT_PAYLOAD)
        if len(buffer) < kept:
            return None
        payload = bytes(buffer[HEADER.size : kept])
        self._skip = length - kept
        del buffer[:kept]
        return ControlMessage(code, payload)


def state_at(position: int) -> ParserState:
    """Return the state of a parser that stood at `position`. What it had read of a message is lost.

    The rest of that message becomes an unsolicited event, whatever it was.
    """
    size, rest = position >> _POSITION_BITS, position & ~_IN_MESSAGE
    if size < HEADER.size:
        return ParserState(rest.to_bytes(size, "big"), None, 0)
    return ParserState(b"", (Code.NEXT, b""), rest)


class Quiz:
    """Commands in a random order, whose answers prove that an agent is up.

    An agent sends READY only once, after it boots, so a host that connects later has to ask. The agent may
    still be busy with an earlier host's commands, and answers those first. So one answer proves nothing. A
    series of answers that matches the commands does, and no answer to an earlier command can follow it.
    `version` is answered with a number, `ping` with nothing.
    """

    #: Answers to other commands match by chance in one of 65,536 cases.
    _LENGTH = 16
    _VERSION = (4242).to_bytes(4, "big")

    def __init__(self) -> None:
        bits = secrets.randbits(self._LENGTH)
        self._ask(Code.VERSION if bits >> at & 1 else Code.PING for at in range(self._LENGTH))
        self._got: deque[bytes | None] = deque(maxlen=self._LENGTH)

    @classmethod
    def from_state(cls, state: QuizState) -> Self:
        """Return a quiz whose commands another process has sent."""
        quiz = cls()
        quiz._ask(map(Code, state.codes))
        quiz._got.extend(state.got)
        return quiz

    def state(self) -> QuizState:
        """Return what `from_state` needs."""
        return QuizState(list(map(int, self.codes)), list(self._got))

    def _ask(self, codes: Iterable[Code]) -> None:
        self.codes = list(codes)
        self._expected = [self._VERSION if code is Code.VERSION else b"" for code in self.codes]

    def receive_answer(self, answer: ControlMessage) -> bool:
        """Take an ACK or ERROR; returns whether it completes the series."""
        self._got.append(answer.payload if answer.code == Code.ACK else None)
        return list(self._got) == self._expected


class ControlChannel:
    """The state of one control channel, seen from the host.

    Answers come in the order of their commands, so each ACK or ERROR completes the oldest unanswered command.
    A command whose sender has given up stays in line, so that its late answer is not taken for the next
    command's. Everything else the agent sends is an unsolicited event.
    """

    def __init__(self) -> None:
        self._parser = ControlParser()
        self._unanswered: deque[Command] = deque()
        #: Bytes to be sent. The caller removes from the front what it has sent.
        self.outgoing = bytearray()
        self._quiz: Quiz | None = None
        #: Whether READY has come.
        self.ready = False
        #: Whether the agent takes commands: it has sent READY, or answered the quiz.
        self.is_up = False

    def state(self) -> ControlChannelState:
        """Return what `restore` needs, except `commands`."""
        quiz = self._quiz.state() if self._quiz else None
        return ControlChannelState(self._parser.state(), bytes(self.outgoing), quiz, self.ready, self.is_up)

    def restore(self, state: ControlChannelState, commands: Iterable[Command]) -> None:
        """Go on where another channel stood, with its unanswered commands."""
        self._parser.restore(state.parser)
        self.outgoing += state.outgoing
        self._quiz = Quiz.from_state(state.quiz) if state.quiz else None
        self.ready, self.is_up = state.ready, state.is_up
        self._unanswered.extend(commands)

    @property
    def commands(self) -> list[Command]:
        """The unanswered commands, oldest first."""
        return list(self._unanswered)

    @property
    def unanswered(self) -> int:
        """How many commands are unanswered, including those whose senders gave up."""
        return len(self._unanswered)

    def send(self, code: Code, payload: bytes = b"", on_answer: OnAnswer = ignore) -> Command:
        """Queue a command in `outgoing`; `receive_data` will fill in its `answer`."""
        command = Command(code, on_answer)
        self.outgoing += encode(code, payload)
        self._unanswered.append(command)
        return command

    @property
    def is_quizzed(self) -> bool:
        """Whether `ask` has been called."""
        return self._quiz is not None

    def ask(self, quiz: Quiz) -> None:
        """Queue the quiz in `outgoing`; its answers set `is_up`. Call it once, before any command."""
        self._quiz = quiz
        for code in quiz.codes:
            self.outgoing += encode(code)

    @property
    def missing(self) -> int:
        """How many bytes of the message that has begun are still to come; 0 if none has begun."""
        return self._parser.missing

    @property
    def position(self) -> int:
        """Where the agent stands in its messages (`ControlParser.position`)."""
        return self._parser.position

    @property
    def error(self) -> str | None:
        """Why what the agent sent is no message, if it is none; the channel is unusable after that."""
        return self._parser.error

    def receive_data(self, data: bytes) -> list[ControlMessage]:
        """Take bytes as they arrive, complete commands, and return the unsolicited events.

        An ACK or ERROR that answers no command counts as one.
        """
        events = []
        for message in self._parser.receive_data(data):
            if message.code in _ANSWERS and self._unanswered:
                self._unanswered.popleft().take(message)
                continue
            if message.code == Code.READY:
                self._boot()
            elif message.code in _ANSWERS and self._quiz and not self.is_up:
                self.is_up = self._quiz.receive_answer(message)
            events.append(message)
        return events

    def _boot(self) -> None:
        """Handle READY. The agent has just booted, so it has yet to answer a quiz that was sent before."""
        if self._quiz and not self.is_up:
            self._unanswered.extend(Command(code) for code in self._quiz.codes)
        self.ready = self.is_up = True
