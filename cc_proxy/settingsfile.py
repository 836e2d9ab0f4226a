"""Settings files: TOML, read and checked whole. Errors are in TOML's words, not in msgspec's."""

import errno
import os
import re
import stat
import tomllib
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cc_proxy.log.printable import printable

#: Longest file that is read, in characters: many times longer than any real one.
_MOST_READ = 1024 * 1024

#: msgspec's names of types, in TOML's words.
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "a table",
    "null": "nothing",
}

_ABSOLUTE_PATH = r"^/[^\x00]*$"
_PATH = r"^[^\x00]+$"
_TEXT = r"^[^\x00]*$"
#: The patterns in words, for errors.
_PATTERNS = {
    _ABSOLUTE_PATH: "an absolute path",
    _PATH: "a path",
    _TEXT: "a string without NUL characters",
}

#: Types of settings that are passed to the system, which takes no NUL.
AbsolutePath = Annotated[str, Meta(pattern=_ABSOLUTE_PATH)]
Path = Annotated[str, Meta(pattern=_PATH)]
Text = Annotated[str, Meta(pattern=_TEXT)]

#: The values that a setting may have, by its name, for settings with a fixed set of values.
Choices = dict[str, tuple[str, ...]]

T = TypeVar("T", bound=msgspec.Struct)


class SettingsError(Exception):
    """A settings file cannot be used; the text names the file, the key and what was expected."""


class SettingsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common shape of the tables: immutable, and strict about unknown keys."""


def decode(text: str, source: str, kind: type[T], choices: Choices) -> T:
    """Return the settings that a TOML text describes. Raises `SettingsError`, naming `source` and the key."""
    try:
        return msgspec.convert(tomllib.loads(text), kind, dec_hook=_resolve)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{source}: {printable(_explain(str(error), choices))}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and an int of thousands of digits
        raise SettingsError(f"{source}: not valid TOML: {printable(str(error))}") from None


def read(path: str, *, optional: bool) -> str | None:
    """Return the text of a settings file; None if it is missing and `optional`.

    Raises `SettingsError` if it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", opener=_open_regular) as file:
            text = file.read(_MOST_READ + 1)
    except (OSError, UnicodeDecodeError) as error:
        if optional and isinstance(error, FileNotFoundError):
            return None
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"{path}: cannot be read: {reason}") from None
    if len(text) > _MOST_READ:
        raise SettingsError(f"{path}: longer than {_MOST_READ} characters")
    return text


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file only: opening anything else may block or have an effect. Raises `OSError`."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(mode) else "not a regular file")


def _resolve(kind: type[Any], given: Any) -> Any:
    """Convert a value from the file into a type that TOML lacks."""
    return kind.resolve(given)


def _explain(error: str, choices: Choices) -> str:
    """Turn msgspec's ``what - at `$.table.key` `` into `table.key: what`, in the words of TOML."""
    if " - at `$" not in error:
        return _in_words(error)
    what, _, where = error.rpartition(" - at `$")
    key = where.strip("`").lstrip(".").partition("[")[0]
    if key in choices and what.startswith("Invalid enum value"):
        got = what.removeprefix("Invalid enum value")
        what = f"expected one of {', '.join(choices[key])}, got{got}"
    elif " regex " in what:
        what = "expected " + next(words for pattern, words in _PATTERNS.items() if repr(pattern) in what)
    else:
        what = _in_words(what)
    return f"{key}: {what}" if key else what


def _in_words(what: str) -> str:
    """Turn ``Expected `int` >= 1, got `str` `` into the words of TOML."""
    what = what.replace("Object contains unknown field", "unknown setting").replace("Expected", "expected")
    return re.sub(r"`(\w+)`(?=[ ,]|$)", lambda name: _TYPES.get(name[1], name[0]), what)
