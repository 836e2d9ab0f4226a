"""What others chose, shown: nothing of it reaches the terminal but letters."""

from __future__ import annotations

import json
import sys

from cc_proxy.log.printable import printable, printable_json, printable_lines

ALL = "".join(map(chr, range(sys.maxunicode + 1)))


def test_every_character_is_shown_or_spelled_out() -> None:
    assert printable(ALL).isprintable()
    assert printable("é 漢 \\") == "é 漢 \\"
    assert printable("a\x1b[2J\r\n\x9b\u202e\ud800") == r"a\x1b[2J\r\n\x9b\u202e\ud800"


def test_json_says_the_same() -> None:
    text = json.dumps({"all": list(ALL)}, ensure_ascii=False, indent=1)
    shown = printable_json(text)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert json.loads(shown) == json.loads(text)


def test_lines_stay_lines_away_from_the_margin() -> None:
    assert printable_lines("a\n  b\x1b\r\n\nc") == "    a\n      b\\x1b\\r\n    \n    c"
