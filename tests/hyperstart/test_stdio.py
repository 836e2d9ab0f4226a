"""Which streams a command puts processes on."""

import pytest

from cc_proxy.hyperstart.stdio import stdio_seqs


@pytest.mark.parametrize(
    ("payload", "seqs"),
    [
        (b'{"container":"c","process":{"terminal":false,"stdio":3,"stderr":4,"args":["x"]}}', [3]),
        (b'{"id":"c","process":{"stdio":9007199254740991}}', [9007199254740991]),
        (b'{"containers":[{"process":{"stdio":1}},{"process":{"stdio":5}}],"hostname":"h"}', [1, 5]),
        (b' { "process" : { "std\\u0069o" : 7 } } ', [7]),
        (b'{"process":{"stdio":7.0}}', [7]),
        (b'{"process":{"stdio":7e0}}', [7]),
        (b'{"process":{"stdio":18446744073709551615}}', [18446744073709551615]),
        (b'{"stdio":2,"process":{"stdio":3}}', [2, 3]),
        (b'[[{"stdio":2}]]', [2]),
    ],
)
def test_stdio_is_found_wherever_it_stands(payload: bytes, seqs: list[int]) -> None:
    assert sorted(stdio_seqs(payload)) == seqs


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"not json",
        b"\xff\xfe",
        b'{"stdio":"\xff"}',
        b'{"process":{"stderr":4,"seq":3}}',
        b'{"process":{"stdio":0}}',
        b'{"process":{"stdio":-1}}',
        b'{"process":{"stdio":1.5}}',
        b'{"process":{"stdio":"3"}}',
        b'{"process":{"stdio":true}}',
        b'{"process":{"stdio":null}}',
        b'{"process":{"stdio":[3]}}',
        b'{"process":{"stdio":18446744073709551616}}',
        b'{"process":{"stdio":1e400}}',
        b'{"process":{"stdio":3}',
        b"[" * 100_000,
        b'{"a":' * 100_000 + b'{"stdio":3}' + b"}" * 100_000,
    ],
)
def test_what_names_none_is_no_error(payload: bytes) -> None:
    assert stdio_seqs(payload) == []


def test_what_is_no_seq_does_not_hide_those_inside() -> None:
    assert stdio_seqs(b'{"stdio":{"stdio":3}}') == [3]


def test_deep_nesting_is_walked() -> None:
    depth = 500
    assert stdio_seqs(b'{"a":' * depth + b'{"stdio":3}' + b"}" * depth) == [3]
