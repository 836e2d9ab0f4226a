"""What the fuzzer makes up, taken for decisions: the same bytes are always the same ones.

Bytes that mean something by themselves would hardly ever get past the first header. Read as choices, almost
any change to them gives another input that is well formed in most of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TypeVar

T = TypeVar("T")

#: Sizes of pieces above this stand for thousands of bytes.
_LARGEST_SMALL_PIECE = 240


class Choices:
    """Decisions, one after the other. Once the bytes have run out every number is 0 and nothing is long."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there are any left."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """The next bytes as they are, fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def number(self, most: int) -> int:
        """From 0 to `most`."""
        size = (most.bit_length() + 7) // 8
        return int.from_bytes(self.take(size), "big") % (most + 1)

    def yes(self) -> bool:
        return bool(self.number(1))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(len(options) - 1)]

    def some(self, most: int, make: Callable[[], T]) -> list[T]:
        """So many of something, fewer if the choices run out."""
        return [make() for _ in range(self.number(most)) if self]

    def raw(self, most: int = 20) -> bytes:
        """Any bytes."""
        return self.take(self.number(most))

    def payload(self, longest: int = 300) -> bytes:
        """Any bytes; those of the long ones are a short one over and over."""
        seed = self.raw(15)
        size = self.number(longest) if self.yes() else len(seed)
        return (seed * (size // len(seed) + 1))[:size] if seed else bytes(size)

    def cuts(self) -> Iterator[int]:
        """Sizes of the pieces that a stream is read in, without end and never all 0."""
        sizes = self.some(4, self._size)
        return cycle(sizes if any(sizes) else [1 << 30])

    def _size(self) -> int:
        size = self.number(255)
        return size if size <= _LARGEST_SMALL_PIECE else (size - _LARGEST_SMALL_PIECE) * 1000


def in_pieces(stream: bytes, sizes: Iterator[int]) -> Iterator[bytes]:
    """The stream in pieces of these sizes, some of which may be empty."""
    while stream:
        size = next(sizes)
        yield stream[:size]
        stream = stream[size:]
