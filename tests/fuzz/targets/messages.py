"""Client messages: their frames, the JSON in them, and the arguments of each payload.

`ProtocolError` may be raised where a slow reading finds nonsense too; its `MemberError` only for an object,
or for what is nested too deeply, which is not looked at any further.
"""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec

from cc_proxy.api import messages
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.messages import MemberError, MessageParser
from cc_proxy.api.payloads import AllocateIoResult, LogLevelChange, Payload, Request, Response, Version
from tests.fuzz.choices import Choices, in_pieces
from tests.fuzz.grammar import value_text
from tests.slow import message, texts_in

_KINDS: tuple[Any, ...] = (*get_args(Payload), Request, Response, Version, AllocateIoResult, LogLevelChange)
_WORDS = (
    "id", "data", "hello", "attach", "bye", "allocateIO", "hyper", "status", "logLevel", "containerId",
    "ctlSerial", "ioSerial", "console", "nStreams", "hyperName", "level", "success", "error", "version",
    "ioBase",
)  # fmt: skip
_LENGTHS = (0, 1, 448, 1_048_576, 1_048_577, 2**32 - 1)


def run(choices: Choices) -> None:
    """A stream of messages; then a text, read as everything that a text may be."""
    cuts = choices.cuts()
    stream = b"".join(choices.some(6, lambda: _message(choices)))
    _check_parser(list(in_pieces(stream, cuts)), stream)
    text = value_text(choices, _WORDS)
    for kind in _KINDS:
        _check_decoded(text, kind)


def _message(choices: Choices) -> bytes:
    kind = choices.number(5)
    if kind == 0:
        return choices.raw()
    if kind == 1:
        return message(choices.payload(40), choices.pick(_LENGTHS), choices.pick((0, 0, 1, 2**31)))
    return message(choices.payload(600))


def _check_parser(pieces: list[bytes], stream: bytes) -> None:
    parser = MessageParser()
    found: list[bytes] = []
    expected, rest, broken = texts_in(stream)
    try:
        for piece in pieces:
            parser.receive_data(piece)
            found += iter(parser.next_text, None)
        assert not broken
        assert found == expected
        assert parser.unfinished == bool(rest)
        assert parser.missing == (8 if len(rest) < 8 else 8 + int.from_bytes(rest[:4], "big")) - len(rest)
    except ProtocolError:
        assert broken
        assert found == expected


def _check_decoded(text: bytes, kind: type[msgspec.Struct]) -> None:
    try:
        decoded = messages.decode(text, kind)
    except MemberError as error:
        assert _slowly(text) is dict or str(error).startswith("nested ")
    except ProtocolError as error:
        assert str(error).isprintable()
    else:
        assert _slowly(text) is dict
        encoded = messages.encode(decoded)
        assert texts_in(encoded) == ([encoded[8:]], b"", False)
        assert messages.decode(encoded[8:], kind) == decoded


def _slowly(text: bytes) -> type | None:
    """What kind of value Python's own decoder finds, which takes more than JSON does."""
    try:
        return type(json.loads(text, parse_int=str, parse_float=str))
    except (ValueError, RecursionError):
        return None
