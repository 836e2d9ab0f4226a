"""Strategies: what arrives, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st


def pieces_of(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """`data` in the pieces that these places, in thousandths of it, cut it into; some may be empty."""
    start = 0
    for stop in sorted(cut * len(data) // 1000 for cut in cuts):
        yield data[start:stop]
        start = stop
    yield data[start:]


#: Where a stream is cut into what is read at once.
cuts = st.lists(st.integers(0, 1000), max_size=12)


@st.composite
def in_pieces(draw: st.DrawFn, streams: st.SearchStrategy[bytes]) -> list[bytes]:
    """A stream as it may arrive: a byte at a time, whole, or anything between."""
    stream = draw(streams)
    if len(stream) <= 300 and draw(st.booleans()):
        return [stream[at : at + 1] for at in range(len(stream))]
    return list(pieces_of(stream, draw(cuts)))


def stream_of(right: st.SearchStrategy[bytes], wrong: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Some units, and now and then what is none, with more behind it."""
    return st.builds(
        lambda units, rest: b"".join([*units, *rest]),
        st.lists(right, max_size=8),
        st.just([]) | st.lists(wrong | right, max_size=3),
    )


@st.composite
def payloads(draw: st.DrawFn, longest: int = 300) -> bytes:
    """Any bytes; the long ones are made of a short one, which is all that matters of them."""
    seed = draw(st.binary(max_size=20))
    if not seed or not draw(st.booleans()):
        return seed
    size = draw(st.integers(0, longest))
    return (seed * (size // len(seed) + 1))[:size]
