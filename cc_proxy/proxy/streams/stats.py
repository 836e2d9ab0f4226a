"""What a channel says of its streams, for `status` and for the next process.

Only the thread that drives the channel calls this.
"""

import time
from collections.abc import Collection

from cc_proxy.api.status import MOST_LISTED, Streams, Traffic, WaitingStream
from cc_proxy.continuity.state.streams import SessionState, StreamsState
from cc_proxy.proxy.streams.output import Output
from cc_proxy.proxy.streams.pacer import Pacer
from cc_proxy.proxy.streams.session import Session
from cc_proxy.proxy.streams.stdin import Stdin


def describe_streams(sessions: Collection[Session], output: Output, stdin: Stdin, pacer: Pacer) -> Streams:
    """Return what `status` says of one VM's streams now."""
    now = time.monotonic()
    waiting = [_waiting(session, output, now) for session in sessions if session.waits]
    waiting.sort(key=lambda stream: (not stream.holds_vm, -stream.idle))
    return Streams(
        sessions=len(sessions),
        traffic=_traffic(output, stdin, pacer),
        paused=bool(output.holding),
        waiting=waiting[:MOST_LISTED],
        waiting_sessions=len(waiting),
        spooled=sum(stream.spooled for stream in waiting),
        pending=sum(stream.pending for stream in waiting),
        stdin_held=sum(map(len, stdin.to_vm)),
        stdin_stalled=now - stdin.stalled_since if stdin.to_vm else 0.0,
        stdin_unacknowledged=len(pacer.asked),
    )


def state_of(sessions: list[SessionState], output: Output, stdin: Stdin, pacer: Pacer) -> StreamsState:
    """Return the streams of one VM, whose sessions have been handed over, as a value."""
    return StreamsState(
        unfinished=output.unfinished,
        to_vm=b"".join(stdin.to_vm),
        sessions=sessions,
        pacer=pacer.state(),
        traffic=_traffic(output, stdin, pacer),
        resync=output.resync.state if output.resync else None,
    )


def _traffic(output: Output, stdin: Stdin, pacer: Pacer) -> Traffic:
    return Traffic(
        bytes_to_clients=output.bytes,
        bytes_to_vm=stdin.bytes,
        frames_to_clients=output.frames,
        frames_to_vm=pacer.frames - pacer.markers,
        stray_frames=output.strays,
        pauses=output.pauses,
    )


def _waiting(session: Session, output: Output, now: float) -> WaitingStream:
    return WaitingStream(
        stream=session.seqs.start,
        pid=session.pid,
        uid=session.uid,
        spooled=session.spooled,
        pending=sum(map(len, session.pending)),
        idle=now - session.idle_since,
        holds_vm=session in output.holding,
        reason=session.stuck,
    )
