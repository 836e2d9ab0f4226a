"""The daemon as values: what each part of it hands over to the next process, and what is kept of it."""

import msgspec


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a part is made of: facts that do not change, and its fds (`Fd`). New members go at the end."""
