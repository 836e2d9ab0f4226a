"""Frames as log lines: which stream, how much, and how it begins."""

from __future__ import annotations

from cc_proxy.linux.fds import Piece
from cc_proxy.log.levels import IO, logger
from cc_proxy.proxy.streams.dump import dump_frames
from tests.proxy.conftest import Logged
from tests.wire.support import frame


def test_each_frame_is_a_line_however_it_is_cut_into_pieces(logged: Logged) -> None:
    logger.setLevel(IO)
    data = frame(1, b"one") + frame(2) + frame(2**64 - 1, b"\x00\xff\n'\"")
    for cut in range(len(data)):
        logged.records.clear()
        pieces: list[Piece] = [memoryview(data)[:cut], data[cut:]]
        dump_frames("vm", "stdin", pieces)
        assert logged.fields("frame") == [
            {"vm": "vm", "stream": 1, "direction": "stdin", "size": 3, "payload": "'one'"},
            {"vm": "vm", "stream": 2, "direction": "stdin", "size": 0, "payload": "''"},
            {
                "vm": "vm",
                "stream": 2**64 - 1,
                "direction": "stdin",
                "size": 5,
                "payload": r"""'\x00\xff\n\'"'""",
            },
        ]
        assert {record.levelno for record in logged.records} == {IO}


def test_long_payloads_are_shortened(logged: Logged) -> None:
    logger.setLevel(IO)
    for size in (48, 49, 10_000):
        dump_frames("vm", "output", [frame(1, b"x" * size)])
    assert [(fields["size"], fields["payload"]) for fields in logged.fields("frame")] == [
        (48, f"'{'x' * 48}'"),
        (49, f"'{'x' * 48}'…"),
        (10_000, f"'{'x' * 48}'…"),
    ]


def test_no_frames_are_no_lines(logged: Logged) -> None:
    logger.setLevel(IO)
    dump_frames("vm", "output", [])
    dump_frames("vm", "output", [b""])
    assert logged.records == []
