"""What cc-proxyctl makes of a process's streams, and what the daemon cuts out of pieces that are one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cc_proxy.ctl.streams import MAX_STDIN_FRAME, STDERR_FD, STDOUT_FD, ProcessStreams, stdin_frames
from cc_proxy.linux.fds import cut
from tests.properties.support import cuts, payloads, pieces_of
from tests.slow import decode_slowly, frame

BASE = 5

outputs = st.lists(
    st.tuples(st.sampled_from([BASE, BASE + 1]), payloads().filter(bool) | st.binary(min_size=1, max_size=1)),
    max_size=10,
)


@given(outputs, st.integers(0, 255), outputs, cuts)
def test_output_is_sorted_and_the_status_is_what_follows_its_end(
    before: list[tuple[int, bytes]], status: int, behind: list[tuple[int, bytes]], at: list[int]
) -> None:
    """What comes on stdout between its end and the status is taken for output unless it is one byte."""
    late = [(seq, payload) for seq, payload in behind if seq != BASE or len(payload) > 1]
    frames = [*before, (BASE, b""), *late, (BASE, bytes([status]))]
    streams, found = ProcessStreams(BASE), {STDOUT_FD: b"", STDERR_FD: b""}
    for piece in pieces_of(b"".join(frame(*one) for one in frames), at):
        assert streams.status is None or not piece
        for fd, output in streams.receive_data(piece):
            assert output
            found[fd] += output
    assert streams.status == status
    assert found[STDOUT_FD] == b"".join(payload for seq, payload in [*before, *late] if seq == BASE)
    assert found[STDERR_FD] == b"".join(payload for seq, payload in [*before, *late] if seq != BASE)
    assert streams.receive_data(frame(BASE, b"too late")) == []


@given(payloads(5 * MAX_STDIN_FRAME))
def test_stdin_is_frames_that_everybody_takes(data: bytes) -> None:
    decoded = decode_slowly(stdin_frames(BASE, data), 8, 12, MAX_STDIN_FRAME)
    assert not decoded.rest
    assert b"".join(payload for _, payload in decoded.units) == data
    assert {seq for seq, _ in decoded.units} == {BASE}
    assert all(payload for _, payload in decoded.units) == bool(data)


@given(st.lists(st.binary(max_size=5), max_size=8), st.integers(0, 45), st.integers(0, 45))
def test_cut_is_a_slice_of_all_pieces_together(pieces: list[bytes], start: int, stop: int) -> None:
    found = cut(pieces, start, stop)
    assert b"".join(found) == b"".join(pieces)[start:stop]
    assert all(map(len, found))
