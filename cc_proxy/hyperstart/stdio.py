"""The streams that a command gives to processes (docs/protocol.md, 2): their `stdio`. No I/O."""

import msgspec

from cc_proxy.hyperstart.codes import Code

#: The commands that start processes.
STARTS = frozenset({Code.START_POD, Code.NEW_CONTAINER, Code.EXEC_CMD})
_LAST_SEQ = (1 << 64) - 1


def stdio_seqs(payload: bytes) -> list[int]:
    """Return the seqs that stand as `stdio` anywhere in a command's JSON, in no particular order.

    Never raises: what is no seq, or no JSON, is left out. The agent judges it.
    """
    try:
        found: list[object] = [msgspec.json.decode(payload)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    seqs = []
    while found:
        value = found.pop()
        if isinstance(value, dict):
            seq = value.get("stdio")
            # An agent takes 3.0 for 3, as JSON does. Booleans are numbers only in Python.
            if isinstance(seq, int | float) and not isinstance(seq, bool) and 0 < seq <= _LAST_SEQ:
                seqs += [int(seq)] if seq == int(seq) else []
            found += value.values()
        elif isinstance(value, list):
            found += value
    return seqs
