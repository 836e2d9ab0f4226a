"""The format in which a daemon leaves its state to the next: what one release has written, the next reads."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from cc_proxy.access import Access, GroupId, UserId
from cc_proxy.continuity.format import (
    VERSION,
    DaemonState,
    decode,
    decode_settings,
    encode,
    encode_settings,
)
from cc_proxy.continuity.table import Unreadable
from cc_proxy.linux.fds import Fd
from cc_proxy.settings import Settings
from tests.continuity.example import example

#: What the first release with this format has written, the fds in it numbered from 1. A newer daemon has to
#: read it: it is never changed, and another one is put beside it when members are added.
GOLDEN = Path(__file__).parent / "golden-1.msgpack"

#: So many are in the example.
FDS = 7


def open_fds() -> list[int]:
    return sorted(os.memfd_create(str(number)) for number in range(FDS))


def test_what_is_encoded_is_decoded_with_other_fds() -> None:
    fds = open_fds()
    data, named = encode(example(iter(fds)))
    assert sorted(named) == fds
    copies = [os.dup(fd) for fd in reversed(named)]
    state = decode(data, copies)
    data, again = encode(state)
    assert sorted(again) == sorted(copies)
    assert [os.fstat(fd).st_ino for fd in again] == [os.fstat(fd).st_ino for fd in named]
    for fd in (*fds, *copies):
        os.close(fd)


def test_fds_that_nobody_knows_are_closed() -> None:
    fds = open_fds()
    stranger = os.memfd_create("stranger")
    data, named = encode(example(iter(fds)))
    decode(data, [*named, stranger])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(stranger)
    for fd in fds:
        os.close(fd)


def test_an_fd_that_is_there_twice_is_closed_once() -> None:
    fds = open_fds()
    data, named = encode(example(iter(fds)))
    twice = [*map(os.dup, named), *named]
    _, again = encode(decode(data, twice))
    assert [*again] == twice[: len(named)]
    for fd in named:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for fd in again:
        os.close(fd)


@pytest.mark.parametrize("spoil", ["cut", "newer", "an fd less"])
def test_what_cannot_be_read_is_never_half_a_state(spoil: str) -> None:
    fds = open_fds()
    data, encoded = encode(example(iter(fds)))
    named = [*encoded]
    if spoil == "cut":
        data = data[:-1]
    elif spoil == "newer":
        data = data.replace(b"\xa7version" + bytes([VERSION]), b"\xa7version" + bytes([VERSION + 1]))
    else:
        os.close(named.pop())
    with pytest.raises(Unreadable):
        decode(data, named)
    for fd in named:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_newer_daemon_reads_what_this_one_writes() -> None:
    numbers = iter(range(1, 100))
    written = msgspec.msgpack.encode(example(numbers), enc_hook=lambda fd: fd.number)
    golden = GOLDEN.read_bytes()
    state = msgspec.msgpack.decode(golden, type=DaemonState, dec_hook=lambda _kind, number: Fd(number))
    assert msgspec.msgpack.encode(state, enc_hook=lambda fd: fd.number) == written


def test_settings_with_names_that_nobody_knows() -> None:
    settings = Settings(
        access=Access(users=(UserId.resolve("nobody-has-this-name"), UserId(7)), groups=(GroupId(5),))
    )
    assert decode_settings(encode_settings(settings)) == settings
    assert decode_settings(b"nonsense") is None
