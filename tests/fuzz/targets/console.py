"""A VM's console, cut into lines for the log.

Nothing may be raised.
"""

from __future__ import annotations

import re

from cc_proxy.proxy.vms.console import LineSplitter
from tests.fuzz.choices import Choices, in_pieces

_LONGEST = 1024
_PIECES = (b"\n", b"\r\n", b"\r", b"", b"\x1b[31m", b"\xff", "é".encode(), b"\0")


def run(choices: Choices) -> None:
    """However it is cut, each byte but those that end lines is in one line, in its place."""
    cuts = choices.cuts()
    stream = b"".join(choices.some(20, lambda: choices.pick(_PIECES) + choices.payload(3000)))
    splitter, lines = LineSplitter(), []
    for piece in in_pieces(stream, cuts):
        lines += splitter.receive_data(piece)
    lines += splitter.finish()
    assert lines == [
        line[at : at + _LONGEST].decode(errors="backslashreplace")
        for line in re.split(rb"[\r\n]", stream)
        for at in range(0, len(line), _LONGEST)
    ]
    assert splitter.finish() == []
