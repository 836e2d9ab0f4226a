"""A state with something in every part of it."""

from __future__ import annotations

from collections.abc import Iterator

from cc_proxy.api.status import Replaced, Traffic
from cc_proxy.continuity.format import DaemonState
from cc_proxy.continuity.state.clients import ConnectionState, ListenerState, ServerState
from cc_proxy.continuity.state.streams import ChannelState, PacerState, SessionState, SpoolFile, StreamsState
from cc_proxy.continuity.state.vms import (
    BootState,
    CommandState,
    ConsoleState,
    ControlState,
    FailedVmState,
    HelloState,
    LifeState,
    RegistryState,
    RequestState,
    TroubleState,
    VmState,
)
from cc_proxy.hyperstart.state import (
    ControlChannelState,
    ParserState,
    QuizState,
    SplitterState,
    WindowState,
)
from cc_proxy.linux.fds import Fd

TRAFFIC = Traffic(
    bytes_to_clients=1, bytes_to_vm=2, frames_to_clients=3, frames_to_vm=4, stray_frames=5, pauses=6
)


def session(fds: Iterator[int]) -> SessionState:
    return SessionState(
        fd=Fd(next(fds)),
        first_seq=1,
        seqs=2,
        uid=1000,
        pid=4711,
        expected=True,
        started=True,
        stdin_open=True,
        output_gone=False,
        splitter=SplitterState(header=b"\0", missing=0, payload_bytes=700, frames=2, at_eof=False),
        window=WindowState(size=512, unacknowledged=300, generation=4, asked=1),
        pending=b"output",
        stuck="the spool is full",
        spool=[SpoolFile(Fd(next(fds)), size=8192, start=4096, stop=5000)],
        patience=0.02,
        patient=0.5,
        idle=2.0,
    )


def control(fds: Iterator[int]) -> ControlState:
    return ControlState(
        fd=Fd(next(fds)),
        channel=ControlChannelState(
            parser=ParserState(buffer=b"\0\0", begun=(9, b"kept"), skip=5),
            outgoing=b"rest",
            quiz=QuizState(codes=[0, 12], got=[b"", None]),
            ready=False,
            is_up=True,
        ),
        commands=[CommandState(code=6, starts=[1], posted=False), CommandState(12, [], posted=True)],
        requests=[RequestState(client=9, code=6, payload=b"{}", age=0.5, starts=[1], sent=0)],
    )


def connection(fds: Iterator[int]) -> ConnectionState:
    return ConnectionState(
        fd=Fd(next(fds)),
        number=9,
        vm=0,
        unread=b"\0\0\0",
        text=b'{"id":"hyper"}',
        delay=0.25,
        unsent=b"response",
        passed=None,
        left=29.5,
        counted=5000,
    )


def example(fds: Iterator[int]) -> DaemonState:
    """Seven of `fds` are in it."""
    streams = StreamsState(
        unfinished=b"\0\0",
        to_vm=b"stdin",
        sessions=[session(fds)],
        pacer=PacerState(frames=7, markers=2, handled=5, echoes_in_a_row=8, lossless=False),
        traffic=TRAFFIC,
    )
    vm = VmState(
        container_id="web",
        owner=1000,
        age=12.5,
        life=LifeState(
            state="UP",
            cause="",
            trouble=TroubleState("ping: no answer", 3.5),
            failed=False,
            came_up=True,
            ends=0,
        ),
        next_seq=3,
        peers=[("/run/vm/ctl", 42)],
        boot=BootState(left=9.5, quizzed_in=1.5, io=None, control=None, console=None),
        control=control(fds),
        console=ConsoleState(Fd(next(fds)), b"[    0.0", "booting"),
        channel=ChannelState(io=Fd(next(fds)), finish_in=None, finish_cause="", streams=streams),
    )
    registry = RegistryState(
        vms=[vm],
        by_id={"web": 0},
        hellos=[HelloState(client=9, vm=0, before=None)],
        failed=[FailedVmState("db", 1000, TroubleState("VM lost", 60.0))],
    )
    return DaemonState(
        program="1.0.0",
        rested_at=1_000.0,
        settings=b"settings",
        log_level="debug",
        known_since=500.0,
        replaced=Replaced(restarts=1, crashes=2, last="restart"),
        faults={"connection failed": 1},
        users={1000: 499.0},
        registry=registry,
        server=ServerState(
            listener=ListenerState(fd=Fd(next(fds)), path=None, for_all=False),
            connections=[connection(fds)],
            next_number=17,
        ),
    )
