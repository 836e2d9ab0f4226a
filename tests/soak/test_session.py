"""A session of the endurance test notices what is lost, changed, or ended by nobody."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from bench.streams import WrongBytesError
from soak.habits import HABITS, Habit
from soak.session import Chunk, Session

TALKS = Habit("talks", down=100_000, up=100_000, payload=100)


class Ends:
    """A session, and the daemon's end of its fd, where the test is the daemon."""

    def __init__(self, habit: Habit) -> None:
        ours, self.daemon = socket.socketpair()
        self.session = Session(1, (5, 6), ours, habit, 0.0)

    def pass_output(self, chunks: Iterator[Chunk]) -> None:
        for chunk in chunks:
            self.daemon.sendall(chunk.frames)
            self.session.sent(len(chunk.frames))

    def close(self) -> None:
        self.session.close()
        self.daemon.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends(TALKS)
    yield ends
    ends.close()


def test_output_and_the_end_of_the_process(ends: Ends) -> None:
    for _ in range(5):
        ends.pass_output(ends.session.output(0.05))
    ends.pass_output(ends.session.exit())
    ends.session.read(vm_gone=False)
    assert ends.session.closed
    assert ends.session.bytes_passed > 20_000
    assert list(ends.session.output(1.0)) == []


@pytest.mark.parametrize("at", [0, 13, 500])
def test_byte_that_is_changed_is_noticed(ends: Ends, at: int) -> None:
    output = bytearray(b"".join(chunk.frames for chunk in ends.session.output(0.05)))
    output[at] ^= 1
    ends.daemon.sendall(output)
    with pytest.raises(WrongBytesError, match=rf"stream 5 \(talks\): byte {at} of"):
        ends.session.read(vm_gone=False)


@pytest.mark.parametrize("vm_gone", [False, True])
def test_output_that_ends_too_early_is_noticed(ends: Ends, vm_gone: bool) -> None:
    chunk, *_ = ends.session.output(0.05)
    ends.session.sent(len(chunk.frames))
    ends.daemon.sendall(chunk.frames[:-1])
    ends.daemon.close()
    with pytest.raises(
        WrongBytesError, match="ended, which nobody has caused" if not vm_gone else "ended after"
    ):
        ends.session.read(vm_gone=vm_gone)


def test_stdin_is_checked_and_has_to_arrive(ends: Ends) -> None:
    ends.session.write(0.01)
    said = ends.daemon.recv(1_000_000)
    assert not ends.session.is_settled()
    for at in range(0, len(said), 112):
        list(ends.session.take_stdin(memoryview(said)[at + 12 : at + 112]))
    assert ends.session.is_settled()
    with pytest.raises(WrongBytesError):
        list(ends.session.take_stdin(memoryview(b"never said")))


def test_end_of_stdin_that_nobody_said_is_noticed(ends: Ends) -> None:
    with pytest.raises(WrongBytesError, match="stdin ends, which its client did not say"):
        list(ends.session.take_stdin(memoryview(b"")))


def test_end_of_stdin_before_all_of_it_is_noticed() -> None:
    ends = Ends(Habit("half-closes", up=10_000, end="half-close"))
    ends.session.write(1.0)
    list(ends.session.end("half-close"))
    ends.session.write(1.0)
    assert ends.daemon.recv(1_000_000)
    assert ends.daemon.recv(1) == b""
    with pytest.raises(WrongBytesError, match="stdin ends after 0 of"):
        list(ends.session.take_stdin(memoryview(b"")))
    ends.close()


def test_there_is_everybody() -> None:
    assert len({habit.name for habit in HABITS}) == len(HABITS)
    assert {habit.end for habit in HABITS} == {"exit", "close", "half-close", "nonsense"}
    assert any(not habit.reads for habit in HABITS)
