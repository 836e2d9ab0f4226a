"""Escapes text that a client or a VM chose, for our log lines and terminals."""


def printable(text: str) -> str:
    """Return `text` with everything escaped that could control a terminal, or break or reorder a line."""
    return text if text.isprintable() else "".join(map(_spelled, text))


def printable_lines(text: str) -> str:
    """Return the lines of `text`, each printable, and indented, because events begin at the margin."""
    return "".join(f"    {printable(line)}\n" for line in text.split("\n")).rstrip("\n")


def printable_json(text: str) -> str:
    """Return equivalent JSON that is safe for a terminal. Its line ends stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else _as_json(char) for char in text)


def _as_json(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def _spelled(char: str) -> str:
    return char if char.isprintable() else ascii(char)[1:-1]
