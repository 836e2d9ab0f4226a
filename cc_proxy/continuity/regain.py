"""After a crash: the value that a channel would have handed over, made from its cells and buffers. No I/O.

What nobody can tell is left out, and reported: as a gap, where bytes may be missing, or as a session that has
to be hung up. A stream never gets a part of a frame, or bytes of another stream.
"""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from cc_proxy.api.frames import FRAME_HEADER, encode_frame
from cc_proxy.api.status import Traffic
from cc_proxy.continuity.cells import (
    ENDED,
    EXPECTED,
    FLAGS,
    GONE,
    LOSSLESS,
    MARKER,
    READING,
    SEEKING,
    SENT_TURN,
    SPLIT,
    SPOOLED,
    STARTED,
    TORN,
    TURNS,
    VM_TORN,
    WHERE_AT,
    Cell,
    Reading,
)
from cc_proxy.continuity.memory import BUFFER_SIZE, STAMP, Memory
from cc_proxy.continuity.state.streams import ChannelState, PacerState, SessionState, StreamsState
from cc_proxy.hyperstart.frames import MAX_FROM_AGENT, frames_of, gather
from cc_proxy.hyperstart.pacing import FIRST_MARKER, MARKERS_TO_TRUST, MOST_QUEUED, StdinWindow
from cc_proxy.hyperstart.splitter import StdinSplitter, state_of
from cc_proxy.hyperstart.state import ResyncState, SplitterState, WindowState
from cc_proxy.linux.fds import Fd

#: The length of a frame without payload.
_EMPTY = FRAME_HEADER.size


class SessionFacts(NamedTuple):
    """What is known of a session: what does not change, and its cell."""

    fd: Fd
    first_seq: int
    seqs: int
    uid: int
    pid: int
    cell: Cell


class ChannelFacts(NamedTuple):
    """What is known of a channel beside its memory."""

    #: None if it is closed while clients have yet to read what had come.
    io: Fd | None
    memory: Memory
    sessions: Sequence[SessionFacts]
    #: The first seq that has not been handed out.
    next_seq: int
    #: `stdin.window` of the settings.
    window: int
    finish_in: float | None = None
    finish_cause: str = ""


class Gap(NamedTuple):
    """Bytes that may be missing."""

    #: Whether they are stdin; otherwise they are output.
    to_vm: bool
    #: The first seqs of the sessions that may be affected; if empty, any session of the VM may be.
    streams: list[int]
    most: int


class HungUp(NamedTuple):
    """A session that cannot go on. Its fd is still open."""

    session: SessionFacts
    reason: str


class Regained(NamedTuple):
    """What to go on with, and what is lost."""

    state: ChannelState
    gaps: list[Gap]
    hung_up: list[HungUp]
    #: Why the VM cannot go on; empty if it can.
    lost: str


class _Doubt(Exception):
    """The text says why a session cannot go on."""


def regain(facts: ChannelFacts) -> Regained:
    """Return what a channel can go on with whose process was killed."""
    cell = facts.memory.cell
    gaps: list[Gap] = []
    hung_up: list[HungUp] = []
    sessions: list[SessionState] = []
    to_vm: list[bytes] = []
    unfinished, resync, ends = _output(facts, gaps)
    for session in sorted(facts.sessions, key=lambda session: session.first_seq):
        try:
            found = _session(session, facts, to_vm, gaps)
        except _Doubt as doubt:
            hung_up.append(HungUp(session, str(doubt)))
            continue
        sessions.append(_ending(found, ends.get(session.first_seq, b"")))
    if resync:  # first: nothing that comes back before the probe is recognised, and the markers have to be
        to_vm.insert(0, encode_frame(resync.probe))
    # The guest may have as many unhandled frames as it has room for.
    pacer = PacerState(MOST_QUEUED, MOST_QUEUED, 0, MARKERS_TO_TRUST, bool(cell[LOSSLESS]))
    streams = StreamsState(
        unfinished=unfinished,
        to_vm=b"".join(to_vm),
        sessions=sessions,
        pacer=pacer,
        traffic=Traffic(0, 0, 0, 0, 0, 0),
        resync=resync,
    )
    lost = "the daemon ended when it had sent a part of a frame" if facts.io and cell[VM_TORN] else ""
    state = ChannelState(facts.io, facts.finish_in, facts.finish_cause, streams)
    return Regained(state, gaps, hung_up, lost)


def _read(reading: Reading, room: memoryview) -> int | None:
    """Return how many bytes were read into `room`; None if nobody can tell."""
    if not reading.busy:
        return reading.size
    if not reading.size:
        return None
    return 0 if room[: reading.size][-len(STAMP) :] == STAMP else reading.size


# Output ---------------------------------------------------------------------------------------------------


def _output(facts: ChannelFacts, gaps: list[Gap]) -> tuple[bytes, ResyncState | None, dict[int, bytes]]:
    """Return what has been read of an unfinished frame, or else the state in which to look for frames.

    And, by first seq, the ends of sessions' processes that have been read (`_end_of`).
    """
    memory = facts.memory
    view = memoryview(memory.output)
    reading = Reading.from_word(memory.cell[READING])
    size = _read(reading, view[reading.where :])
    if size is None or memory.cell[SEEKING]:
        if not facts.io:
            return b"", None, {}
        gaps.append(Gap(to_vm=False, streams=[], most=BUFFER_SIZE + 2 * MAX_FROM_AGENT))
        return b"", ResyncState(facts.next_seq, FIRST_MARKER | secrets.randbits(63)), {}
    stop = reading.where + size
    owners = {
        seq: one.first_seq for one in facts.sessions for seq in range(one.first_seq, one.first_seq + one.seqs)
    }
    batch = gather(memory.output, view, reading.start, stop, owners)
    if batch.slices:
        most = sum(len(piece) for pieces in batch.slices.values() for piece in pieces)
        gaps.append(Gap(to_vm=False, streams=sorted(batch.slices), most=most))
    ends = {seq: _end_of(seq, pieces) for seq, pieces in batch.slices.items()}
    return (bytes(view[batch.stop : stop]) if facts.io else b""), None, ends


def _end_of(stdio: int, pieces: Sequence[memoryview]) -> bytes:
    """Return the end of file among these frames of a session, and the exit status if it is there too."""
    frames = (frame for piece in pieces for frame in frames_of(piece))
    for frame in frames:
        if FRAME_HEADER.unpack_from(frame) == (stdio, _EMPTY):
            statuses = (frame for frame in frames if FRAME_HEADER.unpack_from(frame) == (stdio, _EMPTY + 1))
            return bytes(frame) + bytes(next(statuses, b""))
    return b""


def _ending(session: SessionState, end: bytes) -> SessionState:
    """Have the end of its process passed on, perhaps once more: a client without it would wait for ever.

    A client that has it already reads no more of the stream. An empty frame is no end before there is a
    process.
    """
    if not end or not session.expected or session.output_gone:
        return session
    return replace(session, pending=end, patient=0.0)


# Sessions -------------------------------------------------------------------------------------------------


def _session(session: SessionFacts, facts: ChannelFacts, to_vm: list[bytes], gaps: list[Gap]) -> SessionState:
    """Return a session's state. What its agent is to be sent is added to `to_vm`. Raises `_Doubt`."""
    cell, flags = session.cell, session.cell[FLAGS]
    if cell[TORN] and not flags & GONE:
        raise _Doubt("its client may have a part of a frame")
    reading = Reading.from_word(cell[READING])
    splitter = _splitter(session, reading, memoryview(facts.memory.stdin))
    ended, started = bool(flags & ENDED), bool(flags & STARTED)
    if facts.io and reading.where == (facts.memory.cell[SENT_TURN] + 1) % TURNS:
        if reading.size:
            gaps.append(Gap(to_vm=True, streams=[session.first_seq], most=reading.size))
        if splitter.at_eof:
            to_vm.append(encode_frame(session.first_seq))
        ended = False  # if the client has ended it, that is read once more
    if cell[SPOOLED]:
        gaps.append(Gap(to_vm=False, streams=[session.first_seq], most=cell[SPOOLED]))
    return SessionState(
        fd=session.fd,
        first_seq=session.first_seq,
        seqs=session.seqs,
        uid=session.uid,
        pid=session.pid,
        expected=bool(flags & EXPECTED),
        started=started,
        stdin_open=not ended,
        output_gone=bool(flags & GONE),
        splitter=splitter,
        window=_window(session, facts.window, to_vm, ask=started and not ended),
        pending=b"",
        stuck="",
        spool=[],
        patience=0.0,
        patient=None,
        idle=0.0,
    )


def _splitter(session: SessionFacts, reading: Reading, buffer: memoryview) -> SplitterState:
    """Return where the splitter stands after what was read last. Raises `_Doubt`."""
    state = state_of(session.first_seq, session.cell[SPLIT] & (1 << WHERE_AT) - 1)
    if reading.where == session.cell[SPLIT] >> WHERE_AT:
        return state
    room = buffer[reading.start :]
    size = _read(reading, room)
    if size is None:
        raise _Doubt("it is not known how much of its stdin was read")
    splitter = StdinSplitter(session.first_seq)
    splitter.restore(state)
    data = bytearray(room[:size])
    splitter.split(data, memoryview(data), 0, size)
    if splitter.error:
        raise _Doubt(splitter.error)
    return splitter.state()


def _window(session: SessionFacts, size: int, to_vm: list[bytes], *, ask: bool) -> WindowState | None:
    """Return a window that a new marker will open again, since the agent may not have handled what it has."""
    if not size:
        return None
    window = StdinWindow(session.first_seq, size)
    window.generation = session.cell[MARKER]
    window.reset()
    if ask:
        to_vm.append(window.ask_again())
    return window.state()
