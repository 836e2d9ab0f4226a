"""The control channel's socket, from both sides and from several threads."""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import pytest

from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import MAX_MESSAGE, ControlMessage
from cc_proxy.linux.fds import unread
from cc_proxy.proxy.vms.commands import Asked
from cc_proxy.proxy.vms.control import ControlLink, NoAnswer, NotSent
from cc_proxy.proxy.vms.control_socket import ControlLost
from tests.proxy.support import NEVER, Rig, fill, pair, read_now
from tests.wire.support import (
    ACK,
    ASYNC_EVENT,
    COMMAND,
    ERROR,
    FINISHPOD,
    NEXT,
    PING,
    QUESTIONS,
    READY,
    VERSION_NUMBER,
    WAIT,
    at_end,
    command,
    in_background,
    is_silent,
    read_exact,
    wait_until,
)

HUNG_UP = "the VM hung up its control channel"


def refuse_nothing() -> None:
    raise AssertionError("there is nothing to refuse")


class Agent:
    """The far end, and the link itself."""

    def __init__(self) -> None:
        self.near, self.sock = pair()
        self.events: queue.SimpleQueue[ControlMessage] = queue.SimpleQueue()
        self.link = ControlLink(self.near, self.events.put)
        self.io, self.far_io = pair()
        self.results: queue.SimpleQueue[object] = queue.SimpleQueue()

    def say(self, code: int, payload: bytes = b"") -> None:
        self.sock.sendall(command(code, payload))

    def read(self) -> tuple[int, bytes]:
        code, length = header_of(read_exact(self.sock, 8))
        return code, read_exact(self.sock, length - 8)

    def transact(self, payload: bytes = b"", timeout: float = WAIT) -> ControlMessage:
        return self.link.transact(Asked(Code.PING), payload, timeout)

    @contextmanager
    def asking(self, payload: bytes = b"", timeout: float = WAIT) -> Iterator[None]:
        """A transaction in a thread; its outcome goes to `results`."""

        def ask() -> None:
            try:
                self.results.put(self.transact(payload, timeout))
            except (ControlLost, NoAnswer) as outcome:
                self.results.put(outcome)

        with in_background(ask):
            yield

    def result(self) -> object:
        return self.results.get(timeout=WAIT)

    def close(self) -> None:
        self.sock.close()
        self.link.close()
        self.io.close()
        self.far_io.close()


def header_of(header: bytes) -> tuple[int, int]:
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


# Until it is up -------------------------------------------------------------------------------------------


def test_ready_is_all_that_is_waited_for(agent: Agent) -> None:
    agent.say(ASYNC_EVENT, b"{}")
    agent.say(READY)
    agent.link.wait_until_up(agent.io, WAIT, WAIT)
    assert is_silent(agent.sock), "nothing is sent to an agent that says READY"
    assert [agent.events.get_nowait().code, agent.events.get_nowait().code] == [ASYNC_EVENT, READY]


def answer_questions(agent: Agent, number: int = QUESTIONS) -> None:
    for _ in range(number):
        agent.say(ACK, VERSION_NUMBER if agent.read()[0] == Code.VERSION else b"")


def test_agent_that_has_been_up_before_is_known_by_its_answers(agent: Agent) -> None:
    with in_background(lambda: answer_questions(agent)):
        assert not agent.link.wait_until_up(agent.io, WAIT, 0.0), "it was not seen to boot"


@pytest.mark.parametrize("late", [command(ACK), command(ERROR), command(ACK, VERSION_NUMBER) + command(ACK)])
def test_answers_to_others_come_first_and_are_nobodys(agent: Agent, late: bytes) -> None:
    agent.sock.sendall(late)
    with in_background(lambda: answer_questions(agent)):
        agent.link.wait_until_up(agent.io, WAIT, 0.0)
    assert agent.link.unanswered == 0
    with agent.asking(b"next"):
        assert agent.read() == (PING, b"next")
        agent.say(ACK, b"to the next")
    assert agent.result() == ControlMessage(ACK, b"to the next")


def test_ready_after_the_questions_counts_and_their_answers_stay_theirs(agent: Agent) -> None:
    def boot() -> None:
        agent.read()
        agent.say(READY)

    with in_background(boot):
        assert agent.link.wait_until_up(agent.io, WAIT, 0.0), "it was seen to boot"
    assert agent.link.unanswered == 0, "no client has asked for any"
    with agent.asking(b"next"):
        for _ in range(QUESTIONS - 1):
            agent.read()
        assert agent.read() == (PING, b"next")
        for _ in range(QUESTIONS):
            agent.say(ACK)
        agent.say(ACK, b"to the next")
    assert agent.result() == ControlMessage(ACK, b"to the next")


@pytest.mark.parametrize("left", [0.0, -1.0])
def test_ready_that_came_in_time_counts_though_nobody_looked(agent: Agent, left: float) -> None:
    """As when the daemon was stopped before it came to that."""
    agent.sock.sendall(command(ASYNC_EVENT, b"{}") * 200 + command(READY))
    agent.link.wait_until_up(agent.io, left, NEVER)


@pytest.mark.parametrize("ping_after", [0.0, 0.02, NEVER])
def test_agent_that_says_nothing(agent: Agent, ping_after: float) -> None:
    with pytest.raises(NoAnswer, match="no READY from the VM"):
        agent.link.wait_until_up(agent.io, 0.05, ping_after)
    assert len(read_now(agent.sock)) == (0 if ping_after == NEVER else QUESTIONS * COMMAND.size)


@contextmanager
def talking(agent: Agent) -> Iterator[None]:
    """Without end, until this is left."""
    over = threading.Event()

    def talk() -> None:
        while not over.is_set():
            agent.say(ASYNC_EVENT)
            over.wait(0.001)

    with in_background(talk):
        yield
        over.set()


def test_agent_that_talks_without_end_is_given_up_too(agent: Agent) -> None:
    with talking(agent), pytest.raises(NoAnswer):
        agent.link.wait_until_up(agent.io, 0.1, NEVER)


@pytest.mark.parametrize("ping_after", [0.0, NEVER])
@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        (lambda agent: agent.sock.close(), HUNG_UP),
        (lambda agent: agent.sock.shutdown(socket.SHUT_WR), HUNG_UP),
        (lambda agent: agent.far_io.close(), "the VM hung up its I/O channel"),
        (
            lambda agent: agent.sock.sendall(command(READY, length=7)),
            "control channel: ready with a total length of 7",
        ),
    ],
    ids=["hangs up", "sends no more", "hangs up its I/O channel", "talks nonsense"],
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_vm_that_is_lost_before_it_is_up(
    agent: Agent, trouble: Callable[[Agent], None], cause: str, ping_after: float, when: str
) -> None:
    with ExitStack() as stack:
        if when == "before":
            trouble(agent)
        else:
            stack.enter_context(in_background(lambda: trouble(agent)))
        with pytest.raises(ControlLost) as lost:
            agent.link.wait_until_up(agent.io, WAIT, ping_after)
    # A ping that could not be written, or was not read, tells it another way.
    others = {"control channel: Broken pipe", "control channel: Connection reset by peer"}
    assert str(lost.value) == cause or (ping_after == 0.0 and str(lost.value) in others)


# Transactions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [ACK, ERROR])
@pytest.mark.parametrize("payload", [b"", b"what it says"])
def test_the_answer_is_an_ack_or_an_error(agent: Agent, code: int, payload: bytes) -> None:
    with agent.asking(b"payload"):
        assert agent.read() == (PING, b"payload")
        for event in (NEXT, READY, FINISHPOD, ASYNC_EVENT, 99):
            agent.say(event)
        agent.say(code, payload)
    assert agent.result() == ControlMessage(code, payload)
    assert [agent.events.get_nowait().code for _ in range(5)] == [NEXT, READY, FINISHPOD, ASYNC_EVENT, 99]


def test_of_several_threads_one_is_served_at_a_time(agent: Agent) -> None:
    with ExitStack() as stack:
        for number in range(8):
            stack.enter_context(agent.asking(b"%d" % number))
        for _ in range(8):
            _, payload = agent.read()
            assert is_silent(agent.sock), "the next one waits for the answer"
            agent.say(ACK, payload)
    results = [agent.result() for _ in range(8)]
    assert {result.payload for result in results if isinstance(result, ControlMessage)} == {
        b"%d" % number for number in range(8)
    }


def test_each_thread_gets_the_answer_to_its_own(agent: Agent) -> None:
    def serve() -> None:
        for _ in range(200):
            _, payload = agent.read()
            agent.say(ASYNC_EVENT)
            agent.say(ACK, payload)

    def ask(name: str) -> None:
        for number in range(50):
            payload = f"{name} {number}".encode()
            assert agent.transact(payload).payload == payload

    with in_background(serve), ExitStack() as stack:
        for name in "abcd":
            stack.enter_context(in_background(partial(ask, name)))


@pytest.mark.parametrize("timeout", [0.0, 0.03])
def test_no_answer_in_time(agent: Agent, timeout: float) -> None:
    with pytest.raises(NoAnswer, match=f"no answer from the VM in {timeout:g} s"):
        agent.transact(timeout=timeout)
    assert agent.read() == (PING, b"")


def test_another_command_in_the_way_all_the_time(agent: Agent) -> None:
    with agent.asking(b"first"):
        assert agent.read() == (PING, b"first")
        with pytest.raises(
            NoAnswer, match=r"no answer in 0\.02 s: another command was in the way all the time"
        ):
            agent.transact(b"second", timeout=0.02)
        assert is_silent(agent.sock), "what was given up before its turn is never sent"
        agent.say(ACK)
    assert agent.link.unanswered == 0


def test_command_behind_questions_that_are_not_answered_is_never_sent(agent: Agent) -> None:
    agent.link.find_out()
    with pytest.raises(NotSent, match=r"no answer from the VM in 0\.02 s"):
        agent.transact(b"not sent", timeout=0.02)
    answer_questions(agent)
    with agent.asking(b"sent"):
        assert agent.read() == (PING, b"sent")
        agent.say(ACK)
    assert agent.result() == ControlMessage(ACK, b"")


def test_events_do_not_prolong_the_deadline(agent: Agent) -> None:
    with talking(agent), pytest.raises(NoAnswer):
        agent.transact(timeout=0.1)


def test_late_answers_are_their_own(agent: Agent) -> None:
    for _ in range(3):
        with pytest.raises(NoAnswer):
            agent.transact(timeout=0)
        agent.read()
    agent.say(ERROR, b"to the first")
    agent.link.read()  # between the commands
    with agent.asking(b"last"):
        assert agent.read() == (PING, b"last")
        agent.say(ACK, b"to the second")
        agent.say(ERROR, b"to the third")
        agent.say(ACK, b"to the last")
    assert agent.result() == ControlMessage(ACK, b"to the last")
    assert agent.link.unanswered == 0
    assert agent.events.empty()


def test_no_more_is_sent_to_an_agent_that_leaves_64_unanswered(agent: Agent) -> None:
    for _ in range(64):
        with pytest.raises(NoAnswer, match="no answer from the VM in 0 s"):
            agent.transact(timeout=0)
    with pytest.raises(NoAnswer, match="not sent: the VM has left 64 commands unanswered"):
        agent.transact(timeout=WAIT)
    assert read_now(agent.sock) == command(PING) * 64
    agent.say(ACK)
    agent.link.read()
    with agent.asking():
        agent.read()
        for _ in range(63):
            agent.say(ERROR)
        agent.say(ACK)
    assert agent.result() == ControlMessage(ACK)


def test_command_goes_out_in_parts_to_an_agent_that_reads_slowly(agent: Agent) -> None:
    agent.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_608)
    payload = bytes(range(256)) * 39
    filled = fill(agent.near)
    with agent.asking(payload):
        wait_until(lambda: agent.link.unanswered == 1, "it is asked")
        read_exact(agent.sock, filled)
        assert agent.read() == (PING, payload)
        agent.say(ACK)
    assert agent.result() == ControlMessage(ACK)
    assert is_silent(agent.sock), "nothing is sent again"


def test_command_that_was_given_up_half_way_is_sent_whole_before_the_next(agent: Agent) -> None:
    agent.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_608)
    first, second = b"1" * 10_000, b"2" * 10_000
    with pytest.raises(NoAnswer):
        agent.transact(first, timeout=0.02)
    assert unread(agent.sock) < len(first)
    with agent.asking(second):
        assert agent.read() == (PING, first)
        assert agent.read() == (PING, second)
        agent.say(ERROR, b"to the first")
        agent.say(ACK, b"to the second")
    assert agent.result() == ControlMessage(ACK, b"to the second")


def test_agent_that_talks_but_does_not_read_is_heard(agent: Agent) -> None:
    fill(agent.near)
    with agent.asking(timeout=NEVER):
        agent.say(ASYNC_EVENT, b"while it does not read")
        assert agent.events.get(timeout=WAIT).payload == b"while it does not read"
        agent.sock.close()
    assert isinstance(agent.result(), ControlLost)


@pytest.mark.parametrize("size", [8, 9, 65_536, 200_000, MAX_MESSAGE + 1])
def test_answer_of_any_size(agent: Agent, size: int) -> None:
    with agent.asking():
        agent.read()
        agent.sock.sendall(command(ACK, bytes(size - 8)))
    result = agent.result()
    assert isinstance(result, ControlMessage)
    assert len(result.payload) == min(size - 8, 65_536)


# Lost -----------------------------------------------------------------------------------------------------


def test_answer_and_end_in_one_read_is_an_answer(agent: Agent) -> None:
    with agent.asking():
        agent.read()
        agent.say(ACK, b"last words")
        agent.sock.close()
    assert agent.result() == ControlMessage(ACK, b"last words")
    with pytest.raises(ControlLost):
        agent.transact()


def test_answer_and_end_is_an_answer_though_the_pump_sees_the_end_first(agent: Agent) -> None:
    """It hangs up the link, from its own thread; what has arrived by then is not lost."""
    for _ in range(20):
        with closing(Agent()) as other:
            with other.asking():
                other.read()
                other.say(ACK, b"last words")
                other.sock.close()
                other.link.hang_up()
            assert other.result() == ControlMessage(ACK, b"last words")


@pytest.mark.parametrize("rest", [command(NEXT, length=3), command(ACK) + command(NEXT, length=3)])
def test_answer_in_front_of_nonsense_is_an_answer(agent: Agent, rest: bytes) -> None:
    """The nonsense is for whoever comes next."""
    with agent.asking():
        agent.read()
        agent.sock.sendall(command(ACK, b"last words") + rest)
    assert agent.result() == ControlMessage(ACK, b"last words")
    with pytest.raises(ControlLost, match="control channel: next with a total length of 3"):
        agent.link.read()
    with pytest.raises(ControlLost):
        agent.transact()


@pytest.mark.parametrize(
    ("trouble", "causes"),
    [
        (lambda agent: agent.sock.close(), {HUNG_UP}),
        (lambda agent: agent.sock.shutdown(socket.SHUT_WR), {HUNG_UP}),
        (lambda agent: agent.link.hang_up(), {HUNG_UP}),
        (
            lambda agent: agent.sock.sendall(command(ACK, length=7)),
            {"control channel: ack with a total length of 7"},
        ),
        (
            lambda agent: agent.sock.sendall(command(NEXT) + command(ERROR, length=MAX_MESSAGE + 1)),
            {f"control channel: error with a total length of {MAX_MESSAGE + 1}"},
        ),
    ],
    ids=["hangs up", "sends no more", "is hung up", "too short", "too long"],
)
def test_lost_in_the_middle_of_a_command(
    agent: Agent, trouble: Callable[[Agent], None], causes: set[str]
) -> None:
    with agent.asking(), agent.asking(b"another"):
        agent.read()
        trouble(agent)
        agent.link.hang_up()  # as the VM does when it hears of it
    lost = [agent.result(), agent.result()]
    assert all(isinstance(outcome, ControlLost) for outcome in lost)
    assert {str(outcome) for outcome in lost} <= causes | {HUNG_UP, "control channel: Broken pipe"}
    assert causes & {str(outcome) for outcome in lost}


def test_unread_command_at_the_end(agent: Agent) -> None:
    """Which the kernel calls a reset."""
    with agent.asking():
        wait_until(lambda: not is_silent(agent.sock), "the command has arrived")
        agent.sock.close()
    outcome = agent.result()
    assert isinstance(outcome, ControlLost)
    assert str(outcome) in {HUNG_UP, "control channel: Connection reset by peer"}


def test_closing_waits_for_who_uses_it_and_they_find_it_lost(agent: Agent) -> None:
    with ExitStack() as stack:
        for number in range(4):
            stack.enter_context(agent.asking(b"%d" % number, NEVER))
        agent.read()
        agent.link.close()
    for _ in range(4):
        outcome = agent.result()
        assert isinstance(outcome, ControlLost)
    assert at_end(agent.sock)
    with pytest.raises(ControlLost, match="its control channel is closed"):
        agent.transact()
    agent.link.hang_up()
    agent.link.close()


# Commands that nobody waits for ---------------------------------------------------------------------------


def test_posted_command_takes_its_turn_and_no_command_waits_for_its_answer(agent: Agent) -> None:
    answers: list[ControlMessage] = []
    with agent.asking(b"first"):
        agent.read()
        agent.link.post(Code.PING, answers.append, refuse_nothing)
        with agent.asking(b"second"):
            wait_until(lambda: len(agent.link.waiting()) == 2, "it is in line")
            agent.say(ACK, b"to the first")
            assert [agent.read(), agent.read()] == [(PING, b""), (PING, b"second")]
            assert agent.link.unanswered == 1, "the client's"
            agent.say(ACK)
            agent.say(ACK, b"to the second")
    assert answers == [ControlMessage(ACK)]
    said = {agent.result(), agent.result()}
    assert said == {ControlMessage(ACK, b"to the first"), ControlMessage(ACK, b"to the second")}


def test_posted_command_is_sent_at_once_if_nobody_has_the_turn(agent: Agent) -> None:
    answers: list[ControlMessage] = []
    agent.link.post(Code.PING, answers.append, refuse_nothing)
    assert agent.read() == (PING, b"")
    agent.say(ACK)
    assert is_readable(agent)
    agent.link.read()
    assert answers == [ControlMessage(ACK)]


def test_pump_is_not_told_of_what_a_thread_reads_that_it_gave_the_turn() -> None:
    def read() -> None:
        assert link.read()

    def transact(link: ControlLink) -> None:
        assert link.transact(Asked(Code.PING), b"", WAIT).code == ACK

    near, far = pair()
    heard: queue.SimpleQueue[ControlMessage] = queue.SimpleQueue()
    go_on: queue.SimpleQueue[None] = queue.SimpleQueue()

    def note(event: ControlMessage) -> None:
        heard.put(event)
        go_on.get(timeout=WAIT)

    link = ControlLink(near, note)
    io, far_io = pair()
    with far, closing(link), io, far_io:
        far.sendall(command(READY))
        go_on.put(None)
        link.wait_until_up(io, WAIT, WAIT)
        heard.get()
        far.sendall(command(ASYNC_EVENT))
        with in_background(read):
            heard.get(timeout=WAIT)
            with in_background(partial(transact, link)):
                wait_until(lambda: bool(link.waiting()), "it is in line")
                go_on.put(None)
                read_exact(far, 8)
                far.sendall(command(ASYNC_EVENT))
                heard.get(timeout=WAIT)
                far.sendall(command(ASYNC_EVENT))
                assert not select.select([link], [], [], 0)[0]
                go_on.put(None)
                go_on.put(None)
                far.sendall(command(ACK))


# Between commands -----------------------------------------------------------------------------------------


def is_readable(agent: Agent) -> bool:
    return bool(select.select([agent.link], [], [], 0)[0])


def test_it_is_readable_between_commands_alone(agent: Agent) -> None:
    agent.say(READY)
    agent.link.wait_until_up(agent.io, WAIT, WAIT)
    assert not is_readable(agent)
    agent.say(ASYNC_EVENT)
    assert is_readable(agent)
    agent.link.read()
    assert not is_readable(agent)
    with agent.asking():
        agent.read()
        agent.say(ASYNC_EVENT)
        agent.events.get(timeout=WAIT)
        assert not is_readable(agent)
        agent.link.read()  # a turn of the pump that came too late
        agent.say(ACK)
    agent.result()
    agent.say(ASYNC_EVENT)
    assert is_readable(agent)


@pytest.mark.parametrize("timeout", [0.0, 0.02])
def test_it_is_watched_again_after_a_command_that_failed(agent: Agent, timeout: float) -> None:
    agent.say(READY)
    agent.link.wait_until_up(agent.io, WAIT, WAIT)
    with pytest.raises(NoAnswer):
        agent.transact(timeout=timeout)
    agent.say(ACK)
    assert is_readable(agent)
    agent.link.read()
    assert agent.link.unanswered == 0


def test_end_is_noticed_in_the_middle_of_a_command_by_who_has_nothing_to_do_with_it(agent: Agent) -> None:
    with agent.asking():
        agent.read()
        agent.link.read()  # nothing to say
        agent.sock.close()
        wait_until(lambda: is_readable(agent) or not agent.results.empty(), "it is noticed")
        with pytest.raises(ControlLost, match="hung up"):
            agent.link.read()
    assert isinstance(agent.result(), ControlLost)


def test_nothing_to_read_is_no_error(agent: Agent) -> None:
    agent.link.read()
    agent.say(NEXT)
    agent.link.read()
    assert agent.events.get_nowait().code == NEXT


def test_events_between_commands_are_noted_promptly(rig: Rig) -> None:
    before = len(rig.events)
    for number in range(20):
        rig.ctl.sendall(command(ASYNC_EVENT, b"%d" % number))
        wait_until(lambda number=number: len(rig.events) == before + number + 1, "it is noted")  # type: ignore[misc]
    assert [event.payload for event in rig.events[before:]] == [b"%d" % number for number in range(20)]


def test_commands_and_events_beside_a_pump_that_watches(rig: Rig) -> None:
    before = len(rig.events)

    def serve() -> None:
        for number in range(200):
            _, length = header_of(read_exact(rig.ctl, 8))
            payload = read_exact(rig.ctl, length - 8)
            rig.ctl.sendall(command(NEXT) + command(ACK, payload) + command(ASYNC_EVENT, b"%d" % number))

    with in_background(serve):
        for number in range(200):
            answer = rig.control.transact(Asked(Code.PING), b"%d" % number, WAIT)
            assert answer == ControlMessage(ACK, b"%d" % number)
    wait_until(lambda: len(rig.events) == before + 400, "all events are noted")
    assert rig.owner.causes == []


def test_pump_notices_the_end_in_the_middle_of_a_command(rig: Rig) -> None:
    outcomes: list[BaseException] = []

    def ask() -> None:
        with pytest.raises(ControlLost) as lost:
            rig.control.transact(Asked(Code.PING), b"", NEVER)
        outcomes.append(lost.value)

    with in_background(ask):
        read_exact(rig.ctl, 8)
        rig.ctl.close()
    assert outcomes
    rig.wait_ended()
    assert at_end(rig.io)


def test_waiting_for_an_answer_takes_no_cpu_time(agent: Agent) -> None:
    begun = time.process_time()
    with pytest.raises(NoAnswer):
        agent.transact(timeout=0.3)
    assert time.process_time() - begun < 0.1
