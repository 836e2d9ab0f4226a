"""Commands on a control channel, and how one process of the daemon hands them over to the next."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cc_proxy.continuity.state.vms import CommandState, ControlState, RequestState
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import Command, ControlChannel, ControlMessage, OnAnswer, ignore
from cc_proxy.linux.fds import Fd
from cc_proxy.proxy.turns import Waiter

#: Called with a client's command, the stdios of the processes that it may have started, and its answer.
OnAnswered = Callable[[Code, Sequence[int], ControlMessage], None]


@dataclass(eq=False, slots=True)
class Transaction(Waiter):
    """A command that waits for its turn, for its answer, or for both."""

    code: Code
    payload: bytes
    begun: float
    on_answer: OnAnswer = ignore
    #: Called if it cannot be sent. None if a thread waits for the transaction, and finds out itself.
    on_refusal: Callable[[], None] | None = None
    #: What was sent; None until then.
    command: Command | None = None


@dataclass(eq=False, slots=True)
class Asked:
    """A client's command, and what is to happen once it is answered."""

    code: Code
    #: The stdios of the processes that it starts.
    starts: Sequence[int] = ()
    on_answered: OnAnswered = lambda *_: None

    def __call__(self, answer: ControlMessage) -> None:
        self.on_answered(self.code, self.starts, answer)


def control_state(
    sock: socket.socket, channel: ControlChannel, waiting: Mapping[int, Transaction]
) -> ControlState:
    """Return a control channel as a value, which owns the socket from now on; `waiting` is by client."""
    now, commands = time.monotonic(), channel.commands
    return ControlState(
        Fd(sock.detach()),
        channel.state(),
        [
            CommandState(command.code, _starts(command.on_answer), posted=not is_clients(command))
            for command in commands
        ],
        [
            RequestState(
                client=client,
                code=request.code,
                payload=request.payload,
                age=now - request.begun,
                starts=_starts(request.on_answer),
                sent=commands.index(request.command) if request.command else None,
            )
            for client, request in waiting.items()
        ],
    )


def is_clients(command: Command) -> bool:
    """Whether a client asked for a command, rather than the daemon itself."""
    return isinstance(command.on_answer, Asked)


def commands_of(state: ControlState, on_answered: OnAnswered) -> list[Command]:
    """Return the commands that were sent and have no answer yet."""
    return [
        Command(Code(each.code), ignore if each.posted else Asked(Code(each.code), each.starts, on_answered))
        for each in state.commands
    ]


def transactions_of(
    state: ControlState, on_answered: OnAnswered, commands: Sequence[Command]
) -> dict[int, Transaction]:
    """Return each client's transaction, in the order of their turns."""
    now = time.monotonic()
    return {
        each.client: Transaction(
            Code(each.code),
            each.payload,
            now - each.age,
            Asked(Code(each.code), each.starts, on_answered),
            command=None if each.sent is None else commands[each.sent],
        )
        for each in state.requests
    }


def _starts(on_answer: OnAnswer) -> list[int]:
    return list(on_answer.starts) if isinstance(on_answer, Asked) else []
