"""Decoders that take one byte after the other: slow, and too simple to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cc_proxy.hyperstart.splitter import StdinSplitter


@dataclass
class Reading:
    """What a stream of `[key][u32 total length][payload]` consists of, read a byte at a time."""

    key_size: int
    shortest: int
    longest: int
    #: By key, of those for which it is another.
    longest_of: Mapping[int, int] = field(default_factory=dict)
    #: Those that were whole.
    units: list[tuple[int, bytes]] = field(default_factory=list)
    #: What there is of an unfinished one; whether that is nonsense, behind which nothing is understood.
    rest: bytearray = field(default_factory=bytearray)
    broken: bool = False

    def read(self, data: bytes) -> Reading:
        for number in data:
            if not self.broken:
                self.rest.append(number)
                self._look()
        return self

    def _look(self) -> None:
        header_size = self.key_size + 4
        if len(self.rest) < header_size:
            return
        length = int.from_bytes(self.rest[self.key_size : header_size], "big")
        key = int.from_bytes(self.rest[: self.key_size], "big")
        self.broken = not self.shortest <= length <= self.longest_of.get(key, self.longest)
        if len(self.rest) == length and not self.broken:
            self.units.append((key, bytes(self.rest[header_size:])))
            self.rest.clear()


def decode_slowly(stream: bytes, key_size: int, shortest: int, longest: int) -> Reading:
    """Take a whole stream apart."""
    return Reading(key_size, shortest, longest).read(stream)


def frame(seq: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """An I/O frame; `length` is what its header claims."""
    claimed = 12 + len(payload) if length is None else length
    return seq.to_bytes(8, "big") + claimed.to_bytes(4, "big") + payload


@dataclass
class Sorted:
    """What of a VM's stream is whose."""

    by_owner: dict[str, bytes]
    strays: list[tuple[int, int]]  # seq and length
    frames: int
    size: int  # bytes of them
    broken: bool


def sort_slowly(stream: bytes, owners: dict[int, str]) -> Sorted:
    """Sort a VM's stream a frame at a time."""
    found = decode_slowly(stream, 8, 12, 65_536)
    result = Sorted({}, [], len(found.units), 0, found.broken)
    for seq, payload in found.units:
        length = 12 + len(payload)
        result.size += length
        if seq in owners:
            owner = owners[seq]
            result.by_owner[owner] = result.by_owner.get(owner, b"") + frame(seq, payload)
        else:
            result.strays.append((seq, length))
    return result


def split(splitter: StdinSplitter, buffer: bytearray, start: int, stop: int) -> list[bytes | memoryview]:
    """What the splitter makes of a part of the buffer."""
    view, before = memoryview(buffer), bytes(buffer)
    pieces = splitter.split(buffer, view, start, stop)
    assert buffer == before  # another process may have to do it again
    splitter.join(view)
    return pieces


def message(text: bytes, length: int | None = None, reserved: int = 0) -> bytes:
    """A client message; `length` is what its header claims."""
    claimed = len(text) if length is None else length
    return claimed.to_bytes(4, "big") + reserved.to_bytes(4, "big") + text


def texts_in(stream: bytes) -> tuple[list[bytes], bytes, bool]:
    """The texts in a stream, what is left of an unfinished one, and whether the rest is nonsense."""
    found: list[bytes] = []
    unit = bytearray()
    for number in stream:
        unit.append(number)
        if len(unit) >= 8:
            length = int.from_bytes(unit[:4], "big")
            if length > 1_048_576 or any(unit[4:8]):
                return found, bytes(unit), True
            if len(unit) == 8 + length:
                found.append(bytes(unit[8:]))
                unit.clear()
    return found, bytes(unit), False


class StdinReader:
    """Reads a client's stream a byte at a time: what of it may go on, as soon as it is there."""

    def __init__(self, io_base: int) -> None:
        self._io_base = io_base
        self.said: list[int | None] = []  # payload, and None where it said end of file
        self.broken = False
        self._header = b""
        self._missing = 0

    def receive(self, data: bytes) -> None:
        for number in data:
            if self._missing:
                self.said.append(number)
                self._missing -= 1
            elif not self.broken:
                self._header += bytes([number])
                if len(self._header) == 12:
                    self._begin()

    def _begin(self) -> None:
        seq, length = int.from_bytes(self._header[:8], "big"), int.from_bytes(self._header[8:], "big")
        self.broken = seq != self._io_base or length < 12
        self._missing, self._header = max(0, length - 12) * (not self.broken), b""
        if length == 12 and not self.broken:
            self.said.append(None)


def frames_said(io_base: int, stream: bytes) -> list[int | None]:
    """What an agent makes of the frames it is sent, which are all whole and not too long for it."""
    decoded = decode_slowly(stream, 8, 12, 4096)
    assert not decoded.broken
    assert not decoded.rest
    said: list[int | None] = []
    for seq, payload in decoded.units:
        assert seq == io_base
        said += payload or [None]
    return said
