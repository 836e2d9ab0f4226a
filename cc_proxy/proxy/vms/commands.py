"""Commands between two processes of the daemon: what is to happen once they are answered is a value, too."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cc_proxy.continuity.state.vms import CommandState, ControlState, RequestState
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import Command, ControlChannel, ControlMessage, OnAnswer, ignore
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.turns import Waiter

#: What is to happen once a command is answered, which may start processes on these seqs.
OnAnswerTo = Callable[[Code, Sequence[int]], OnAnswer]


@dataclass(eq=False, slots=True)
class Transaction(Waiter):
    """A command that waits for its turn, for its answer, or for both."""

    code: Code
    payload: bytes
    begun: float
    on_answer: OnAnswer = ignore
    #: Called if it cannot be sent. If there is no such call, some thread waits for the transaction.
    on_refusal: Callable[[], None] | None = None
    #: What was sent; None if that is still to be done.
    command: Command | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """What is to happen once a command is answered that starts processes: tell who waits for them."""

    seqs: Sequence[int]
    tell: Callable[[Sequence[int]], None]

    def __call__(self, answer: ControlMessage) -> None:
        if answer.code == Code.ACK:
            self.tell(self.seqs)


@dataclass(frozen=True, slots=True)
class Posted:
    """What is to happen once a command is answered that nobody waits for: it counts no more."""

    count: Callable[[int], None]
    on_answer: OnAnswer

    def __call__(self, answer: ControlMessage) -> None:
        self.count(-1)
        self.on_answer(answer)


def control_state(
    sock: socket.socket,
    channel: ControlChannel,
    waiting: Mapping[int, Transaction],
    in_line: Sequence[Transaction],
) -> ControlState:
    """Return what is known of a control channel, which owns the socket now.

    `waiting` has those that clients wait for, `in_line` those that have not had their turn.
    """
    commands = channel.commands
    first = [pair for pair in waiting.items() if pair[1] not in in_line]
    others = [pair for pair in waiting.items() if pair[1] in in_line]
    others.sort(key=lambda pair: in_line.index(pair[1]))
    return ControlState(
        Fd(sock.detach()),
        channel.state(),
        [_command_state(command) for command in commands],
        [_request_state(client, request, commands) for client, request in [*first, *others]],
    )


def commands_of(state: ControlState, on_answer_to: OnAnswerTo, posted: Posted) -> list[Command]:
    """Return the commands that were sent and have no answer yet."""
    return [
        Command(Code(each.code), posted if each.posted else on_answer_to(Code(each.code), each.starts))
        for each in state.commands
    ]


def transactions_of(
    state: ControlState, on_answer_to: OnAnswerTo, commands: Sequence[Command]
) -> list[tuple[int, Transaction]]:
    """Return each client's transaction, in the order of their turns."""
    now = time.monotonic()
    return [
        (
            each.client,
            Transaction(
                Code(each.code),
                each.payload,
                now - each.age,
                on_answer_to(Code(each.code), each.starts),
                command=None if each.sent is None else commands[each.sent],
            ),
        )
        for each in state.requests
    ]


def _command_state(command: Command) -> CommandState:
    return CommandState(command.code, _starts(command.on_answer), isinstance(command.on_answer, Posted))


def _request_state(client: int, request: Transaction, commands: list[Command]) -> RequestState:
    return RequestState(
        client=client,
        code=request.code,
        payload=request.payload,
        age=time.monotonic() - request.begun,
        starts=_starts(request.on_answer),
        sent=commands.index(request.command) if request.command else None,
    )


def _starts(on_answer: OnAnswer) -> list[int]:
    return list(on_answer.seqs) if isinstance(on_answer, Started) else []
