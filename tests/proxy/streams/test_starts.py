"""Stdin that comes before its process, step by step."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from cc_proxy.proxy.streams.spool import SpoolSpace
from tests.clock import Clock
from tests.proxy.streams.test_channel import Bench
from tests.proxy.support import fill, read_now
from tests.wire.support import Frame, Stream, frame, is_silent

STATUS = b"\7"


@pytest.fixture
def bench(space: SpoolSpace, clock: Clock) -> Iterator[Bench]:
    with Bench(space, clock) as bench:
        yield bench


def allocate(bench: Bench) -> Stream:
    """Streams that no process is on."""
    session, stream = bench.session()
    bench.channel.add(session)
    return stream


def test_stdin_waits_until_its_process_has_been_started(bench: Bench) -> None:
    stream, other = allocate(bench), allocate(bench)
    stream.send(b"early")
    stream.send()
    assert bench.frames() == []
    bench.channel.open_stdin([other.base, 99])
    assert bench.frames() == []
    bench.channel.open_stdin([stream.base])
    assert bench.frames() == [Frame(stream.base, b"early"), Frame(stream.base, b"")]
    bench.channel.open_stdin([stream.base])
    stream.send(b"more")
    assert bench.frames() == [Frame(stream.base, b"more")]


def test_what_waits_for_a_process_holds_up_its_client_and_nobody_else(bench: Bench) -> None:
    stream, other = allocate(bench), bench.open()
    stream.sock.settimeout(None)
    assert fill(stream.sock) > 0
    other.send(b"in")
    assert bench.frames() == [Frame(other.base, b"in")]
    assert bench.is_at_rest()


def test_a_command_that_was_only_sent_opens_nothing(bench: Bench) -> None:
    stream = allocate(bench)
    stream.send(b"early")
    bench.channel.expect_processes([stream.base])
    assert bench.frames() == []


def test_stderr_does_not_open_stdin(bench: Bench) -> None:
    stream = allocate(bench)
    stream.send(b"early")
    bench.channel.open_stdin([stream.base + 1])
    bench.say(frame(stream.base + 1, b"err"))
    assert stream.read_frame() == (stream.base + 1, b"err")
    assert bench.frames() == []


def test_output_opens_stdin(bench: Bench) -> None:
    stream = allocate(bench)
    stream.send(b"early")
    bench.say(frame(stream.base, b"out"))
    assert stream.read_frame() == (stream.base, b"out")
    assert bench.frames() == [Frame(stream.base, b"early")]


def test_answer_of_the_agent_to_what_nobody_owned_is_no_end_of_file(bench: Bench) -> None:
    stream = allocate(bench)
    bench.say(frame(stream.base))
    assert is_silent(stream.sock)
    assert bench.streams().traffic.stray_frames == 1
    end = frame(stream.base) + frame(stream.base, STATUS)
    bench.say(
        frame(99, b"x") + frame(stream.base) + frame(stream.base, b"A") + frame(stream.base, b"BC") + end
    )
    assert read_now(stream.sock) == frame(stream.base, b"A") + frame(stream.base, b"BC") + end
    traffic = bench.streams().traffic
    assert (traffic.stray_frames, traffic.frames_to_clients) == (3, 4)
    assert traffic.bytes_to_clients == len(end) + 13 + 14


def test_two_processes_speak_for_the_first_time_in_one_read(bench: Bench) -> None:
    one, other = allocate(bench), allocate(bench)
    bench.say(
        frame(one.base)
        + frame(other.base)
        + frame(other.base, b"x")
        + frame(one.base)
        + frame(other.base)
        + frame(one.base, b"y")
    )
    assert read_now(other.sock) == frame(other.base, b"x") + frame(other.base)
    assert read_now(one.sock) == frame(one.base, b"y")


def test_many_processes_speak_for_the_first_time_in_one_read_at_little_cost(bench: Bench) -> None:
    streams = [allocate(bench) for _ in range(300)]
    words = b"".join(frame(stream.base, b"x") for stream in streams)
    noise = frame(99_999) + frame(99_998, b"no row of like frames")
    begun = time.process_time()
    bench.say(words + noise * 3_000)
    assert time.process_time() - begun < 0.3
    assert [read_now(stream.sock) for stream in streams] == [frame(stream.base, b"x") for stream in streams]


def test_process_that_ends_before_its_command_is_known_to_be_acknowledged(bench: Bench) -> None:
    """It said nothing: the end of file and the exit status may be read before the ACK, by another thread."""
    stream = allocate(bench)
    bench.mailbox.post(lambda: bench.channel.expect_processes([stream.base]))
    end = frame(stream.base) + frame(stream.base, STATUS)
    bench.say(end)
    assert read_now(stream.sock) == end


def test_client_that_goes_before_its_process_is_started_is_let_go(bench: Bench) -> None:
    allocate(bench).close()
    bench.settle()
    assert bench.streams().sessions == 0
    assert bench.frames() == []


@pytest.mark.parametrize("how", ["half", "whole"])
def test_what_a_client_has_sent_is_its_processes_though_it_has_gone(bench: Bench, how: str) -> None:
    stream = allocate(bench)
    stream.send(b"early")
    if how == "half":
        stream.sock.shutdown(socket.SHUT_WR)
    else:
        stream.close()
    bench.settle()
    assert bench.streams().sessions == 1
    bench.channel.open_stdin([stream.base])
    assert bench.frames() == [Frame(stream.base, b"early"), Frame(stream.base, b"")]


def test_client_that_has_gone_and_whose_process_is_not_started_is_let_go_after_a_while(bench: Bench) -> None:
    streams = [allocate(bench) for _ in range(2)]
    for stream in streams:
        stream.send()
        stream.close()
        bench.pass_time(59)
    assert bench.streams().sessions == 2
    bench.pass_time(1)
    assert bench.streams().sessions == 1
    bench.channel.open_stdin([stream.base for stream in streams])
    assert bench.frames() == [Frame(streams[1].base, b"")]
    assert bench.streams().sessions == 0


def test_client_that_has_gone_and_whose_process_is_never_started_takes_no_turns(bench: Bench) -> None:
    stream = allocate(bench)
    stream.send(b"early")
    stream.close()
    bench.settle()
    assert bench.is_at_rest()
    bench.end()


def test_vm_that_goes_first(bench: Bench) -> None:
    stream = allocate(bench)
    stream.send(b"early")
    bench.io.close()
    assert bench.at_end(stream.sock)
    bench.channel.open_stdin([stream.base])
    assert not bench.channel.is_in_use
