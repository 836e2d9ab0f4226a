"""The streams of one VM from one process to the next. For a thread that has them to itself."""

from collections.abc import Collection, Sequence

from cc_proxy.continuity.state.streams import StreamsState
from cc_proxy.proxy.streams.output import Output
from cc_proxy.proxy.streams.pacer import Pacer
from cc_proxy.proxy.streams.routes import Routes
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.stats import traffic_of
from cc_proxy.proxy.streams.stdin import Stdin


def give_up(
    sessions: Collection[Session], routes: Routes, output: Output, stdin: Stdin, pacer: Pacer
) -> StreamsState:
    """Return the streams as a value that has the sessions' fds now, for `take_over`."""
    return StreamsState(
        unfinished=output.unfinished,
        to_vm=stdin.to_vm,
        sessions=[
            session.hand_over(expected=session.seqs.start in routes.owners)
            for session in sorted(sessions, key=lambda session: session.seqs.start)
        ],
        pacer=pacer.state(),
        traffic=traffic_of(output, stdin),
        resync=output.resync,
    )


def take_over(
    state: StreamsState,
    sessions: Sequence[Session],
    routes: Routes,
    output: Output,
    stdin: Stdin,
    pacer: Pacer,
) -> None:
    """Go on where `give_up` stopped. `sessions` are those of the state, in its order. Raises `OSError`."""
    for session, before in zip(sessions, state.sessions, strict=True):
        routes.add(session)
        if before.expected:
            routes.expect(session.seqs.start)
    pacer.restore(state.pacer, sessions)
    for session in sessions:
        stdin.add(session)
        if session.is_started and session not in pacer.asked:
            stdin.resume(session)
    stdin.restore(state.to_vm)
    output.restore(state.unfinished, state.resync, sessions)
    traffic = state.traffic
    output.bytes, output.frames = traffic.bytes_to_clients, traffic.frames_to_clients
    output.strays, output.pauses = traffic.stray_frames, traffic.pauses
    stdin.bytes = traffic.bytes_to_vm
