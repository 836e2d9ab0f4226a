"""JSON as the fuzzer writes it: mostly well formed, with names that mean something, and some nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tests.fuzz.choices import Choices

_LITERALS = (
    b"null", b"true", b"false", b"0", b"1", b"2", b"-1", b"1.5", b"1e999", b"-0", b"18446744073709551616",
    b'""', b"{}", b"[]", b"NaN", b"tru", b'"\\ud800"', b'"\\u0000"', b'"\xff"', b"01", b"1.", b"",
)  # fmt: skip
_DEEPEST = 4


def object_text(choices: Choices, words: Sequence[str], depth: int = 0) -> bytes:
    """An object with members of these names, mostly."""
    members = choices.some(6, lambda: _key(choices, words) + b":" + value_text(choices, words, depth + 1))
    return b"{" + b",".join(members) + b"}"


def value_text(choices: Choices, words: Sequence[str], depth: int = 0) -> bytes:
    """A value of any kind."""
    kinds: Sequence[Callable[[], bytes]] = (
        lambda: json.dumps(choices.pick(words)).encode(),
        lambda: choices.pick(_LITERALS),
        lambda: b"%d" % choices.number(300),
        lambda: b'"' + choices.payload(1200) + b'"',
        choices.raw,
        lambda: b"[" + b",".join(choices.some(4, lambda: value_text(choices, words, depth + 1))) + b"]",
        lambda: _nested(choices),
        lambda: object_text(choices, words, depth),
    )
    return choices.pick(kinds if depth < _DEEPEST else kinds[:5])()


def _nested(choices: Choices) -> bytes:
    """Brackets inside each other, perhaps too many, perhaps not all closed."""
    opening, closing = choices.pick(((b"[", b"]"), (b'{"k":', b"}")))
    depth = choices.number(300)
    return opening * depth + choices.pick(_LITERALS) + closing * max(0, depth - choices.pick((0, 0, 0, 1)))


def _key(choices: Choices, words: Sequence[str]) -> bytes:
    known = choices.number(3) < 3
    return json.dumps(choices.pick(words)).encode() if known else b'"' + choices.raw() + b'"'
