"""What tells that an agent has handled the stdin it was sent, if its markers do not, step by step."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest

from cc_proxy.proxy.streams.spool import SpoolSpace
from tests.clock import Clock
from tests.proxy.conftest import Logged
from tests.proxy.streams.test_channel import ECHO_TIMEOUT, WINDOW, Bench
from tests.wire.support import MARKER, Frame, Stream, frame


@pytest.fixture
def bench(space: SpoolSpace, clock: Clock) -> Iterator[Bench]:
    with Bench(space, clock, window=WINDOW) as bench:
        yield bench


def send(bench: Bench, size: int = 10 * WINDOW) -> Stream:
    stream = bench.open()
    stream.send(bytes(size))
    assert payload(bench.frames(), stream) <= WINDOW
    return stream


def payload(frames: list[Frame], stream: Stream) -> int:
    return sum(len(found.payload) for found in frames if found.seq == stream.base)


def marker_of(frames: list[Frame]) -> int:
    return next(found.seq for found in reversed(frames) if found.seq >= MARKER)


def answer(bench: Bench, answered: bool = True) -> list[Frame]:
    """What asks the agent is answered; returns what it gets then."""
    rounds, bench.rounds[:] = bench.rounds[:], []
    for call_back in rounds:
        call_back(answered)
    return bench.frames()


def test_commands_are_carried_out_once_a_marker_is_late(bench: Bench) -> None:
    stream = send(bench)
    bench.pass_time(ECHO_TIMEOUT - 1)
    assert bench.rounds == []
    bench.pass_time(1)
    bench.frames()
    bench.pass_time(0.1)
    assert len(bench.rounds) == 1
    assert 0 < payload(answer(bench), stream) <= WINDOW


def test_one_command_more_is_carried_out_than_frames_may_wait_in_the_guest(bench: Bench) -> None:
    """The agent takes one command and one frame in each round of its loop."""
    one, other = send(bench), send(bench)
    bench.pass_time(ECHO_TIMEOUT)
    assert len(bench.frames()) == 2  # both markers again, behind twice data and a marker
    bench.pass_time(0.1)
    assert bench.commands == 2 * 2 + 2 + 1
    marker = marker_of(answer(bench))
    bench.say(frame(marker))
    bench.frames()
    bench.pass_time(0.1)
    assert bench.commands <= 2 * 2 + 1, "what was in front of a marker that came back is handled"
    one.close()
    other.close()


def test_commands_wait_until_the_vm_has_taken_everything(bench: Bench) -> None:
    send(bench)
    bench.pass_time(ECHO_TIMEOUT)
    for _ in range(20):
        bench.pass_time(1)
        assert bench.rounds == []
    for _ in range(20):
        bench.frames()
        bench.pass_time(1)
    assert len(bench.rounds) == 1


def test_commands_that_are_not_answered_prove_nothing(bench: Bench, logged: Logged) -> None:
    """A VM that stands still for a while is no agent that echoes nothing."""
    stream = send(bench)
    for _ in range(30):
        bench.pass_time(ECHO_TIMEOUT)
        assert payload(bench.frames(), stream) == 0
        bench.pass_time(0.1)
        assert payload(answer(bench, answered=False), stream) == 0
    assert logged.at(logging.WARNING) == []
    assert bench.streams().stdin_unacknowledged == 1


def test_commands_that_are_never_answered_do_not_stop_markers(bench: Bench) -> None:
    stream = send(bench)
    for _ in range(3):
        bench.pass_time(ECHO_TIMEOUT)
        marker = marker_of(bench.frames())
        bench.pass_time(0.1)
    assert len(bench.rounds) == 1
    bench.say(frame(marker))
    assert payload(bench.frames(), stream)


def test_commands_stand_for_what_was_sent_before_them_only(bench: Bench) -> None:
    one = send(bench)
    bench.pass_time(ECHO_TIMEOUT)
    marker = marker_of(bench.frames())
    bench.pass_time(0.1)
    assert len(bench.rounds) == 1
    other = send(bench)
    bench.say(frame(marker))  # it comes after all, and the next part is sent
    assert payload(bench.frames(), one)
    frames = answer(bench)
    assert payload(frames, one) == payload(frames, other) == 0


def test_answer_that_comes_twice_or_for_who_has_gone_is_no_matter(bench: Bench) -> None:
    stream = send(bench)
    bench.pass_time(ECHO_TIMEOUT)
    bench.frames()
    bench.pass_time(0.1)
    (call_back,) = bench.rounds
    stream.sock.sendall(frame(99))
    stream.close()
    for _ in range(2):
        call_back(True)
        bench.settle()


def test_where_echoes_are_lost_the_next_part_does_not_wait_for_them(bench: Bench) -> None:
    stream = send(bench)
    bench.pass_time(ECHO_TIMEOUT)
    bench.frames()
    bench.pass_time(0.1)
    sent = payload(answer(bench), stream)
    for _ in range(5):
        bench.pass_time(0.1)  # much less than an echo may take
        sent += payload(answer(bench), stream)
    assert sent >= 5 * WINDOW / 2


def test_where_echoes_come_again_commands_are_needed_no_more(bench: Bench) -> None:
    stream = send(bench, 100 * WINDOW)
    bench.pass_time(ECHO_TIMEOUT)
    bench.frames()
    bench.pass_time(0.1)
    frames = answer(bench)
    for _ in range(20):
        bench.say(frame(marker_of(frames)))
        frames = bench.frames()
        assert payload(frames, stream)
    answer(bench, answered=False)
    bench.pass_time(ECHO_TIMEOUT / 2)
    assert bench.rounds == []


@pytest.mark.parametrize("floods", [False, True])
def test_agent_that_echoes_nothing_is_paced_by_commands_for_ever(bench: Bench, floods: bool) -> None:
    """Though all is quiet: rounds of commands are short, and output that comes in bursts hides in between."""
    flooding, stream = bench.open(), send(bench, 40 * WINDOW)
    bench.pass_time(ECHO_TIMEOUT)
    for _ in range(20):
        if floods:
            bench.say(frame(flooding.base, b"x"))
        assert payload(bench.frames(), stream) <= WINDOW
        bench.pass_time(0.1)
        assert len(bench.rounds) == 1
        assert 0 < payload(answer(bench), stream) <= WINDOW


@pytest.mark.parametrize("seed", range(5))
def test_every_byte_arrives_whatever_echoes_are_lost(bench: Bench, seed: int) -> None:
    """The agent keeps 512 bytes for each process, and hands them on before it answers the second command."""
    rng = random.Random(seed)
    streams = [bench.open() for _ in range(3)]
    data = {stream.base: rng.randbytes(8_000) for stream in streams}
    taken = dict.fromkeys(data, b"")
    kept = dict.fromkeys(data, 0)
    for stream in streams:
        stream.send(data[stream.base])
    for _ in range(3_000):
        for seq, part in bench.frames():
            if seq < MARKER:
                taken[seq] += part
                kept[seq] += len(part)
                assert kept[seq] <= WINDOW
            elif rng.random() < 0.1:
                kept[seq & 0xFFFF] = 0
                bench.io.sendall(frame(seq))
        if bench.rounds and rng.random() < 0.5:
            kept = dict.fromkeys(data, 0)
            for found in answer(bench):  # what is sent now came after the commands
                bench_take(found, taken, kept)
        if taken == data:
            return
        bench.pass_time(0.1)
    raise AssertionError("it does not come to an end")


def bench_take(found: Frame, taken: dict[int, bytes], kept: dict[int, int]) -> None:
    if found.seq < MARKER:
        taken[found.seq] += found.payload
        kept[found.seq] += len(found.payload)


# Lossless agents ---

LOSSLESS = frame(MARKER, b"\1")


def test_lossless_agent_is_sent_more_at_once(bench: Bench) -> None:
    bench.say(LOSSLESS)
    stream = bench.open()
    stream.send(bytes(100_000))
    assert 65_000 < payload(bench.frames(), stream) <= 64 * 1024


def test_lossless_agent_is_known_by_the_first_marker_too(bench: Bench) -> None:
    stream = bench.open()
    stream.send(bytes(100_000))
    frames = bench.frames()
    assert payload(frames, stream) <= WINDOW
    bench.say(frame(marker_of(frames), b"\1"))
    assert 65_000 < payload(bench.frames(), stream) <= 64 * 1024


@pytest.mark.parametrize("said", [frame(MARKER, b"12"), frame(MARKER + (5 << 48) + 1, b"\1"), frame(MARKER)])
def test_other_frames_of_nobody_say_nothing_like_it(bench: Bench, said: bytes) -> None:
    bench.say(said)
    stream = bench.open()
    stream.send(bytes(100_000))
    assert payload(bench.frames(), stream) <= WINDOW


def test_lossless_agent_is_waited_for_and_not_asked(bench: Bench, logged: Logged) -> None:
    bench.say(LOSSLESS)
    stream = bench.open()
    stream.send(bytes(100_000))
    frames = bench.frames()
    marker = marker_of(frames)
    for _ in range(100):
        bench.pass_time(ECHO_TIMEOUT)
        assert bench.frames() == []
    assert bench.rounds == []
    assert logged.at(logging.WARNING) == []
    bench.say(frame(marker, b"\1"))
    assert payload(bench.frames(), stream) == 100_000 - payload(frames, stream)


def test_commands_under_way_count_no_more_once_the_agent_says_that_it_is_lossless(bench: Bench) -> None:
    stream = send(bench)
    bench.pass_time(ECHO_TIMEOUT)
    bench.frames()
    bench.pass_time(0.1)
    assert len(bench.rounds) == 1
    bench.say(LOSSLESS)
    assert payload(answer(bench), stream) == 0
