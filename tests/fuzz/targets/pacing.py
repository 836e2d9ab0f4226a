"""Stdin's window: whatever seqs come back, the agent is never sent more than it can keep.

Nothing may be raised.
"""

from __future__ import annotations

from cc_proxy.hyperstart.pacing import StdinWindow
from tests.fuzz.choices import Choices
from tests.slow import decode_slowly


def run(choices: Choices) -> None:
    """Stdin and markers on their way to an agent, which sends markers back, or does not."""
    base, size = 1 + choices.number(2**48 - 2), 1 + choices.number(2000)
    window = StdinWindow(base, size)
    latest: int | None = None  # the only seq that makes room
    asked = 0
    held = 0
    late: set[int | None] = set()  # of which copies may still be on their way
    while choices:
        kind = choices.number(4)
        if kind == 0 and window.room:
            payload = choices.number(window.room)
            held += payload
            if marker := window.sent(payload):
                latest, asked = _seq_of(marker), 1
                assert latest not in late
        elif kind == 1 and latest is not None:
            again = _seq_of(window.ask_again())
            assert again == latest
            asked += 1
        elif kind == 2:
            window.reset()
            late |= {latest}
            latest, asked, held = None, 0, 0
        else:
            seq = _answer(choices, base, latest)
            if window.echoed(seq):
                assert seq == latest
                late = {seq} if asked > 1 else set()
                latest, asked, held = None, 0, 0
            else:
                assert seq != latest
        assert window.asked == asked
        assert window.room == (0 if asked else size - held)
        assert asked or window.room


def _seq_of(marker: bytes) -> int:
    (unit,) = decode_slowly(marker, 8, 12, 12).units
    assert unit[0] >= 1 << 63
    return unit[0]


def _answer(choices: Choices, base: int, latest: int | None) -> int:
    """What comes back: the right seq, one that differs in a bit, or another."""
    kind = choices.number(3)
    if kind == 0 or latest is None:
        return choices.pick((0, base, (1 << 63) + base, 2**64 - 1))
    return latest ^ (1 << choices.number(63)) if kind == 1 else latest
