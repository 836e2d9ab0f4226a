"""Settings: any value for any key is taken, or refused by the name of its key."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from cc_proxy.settings import parse
from cc_proxy.settingsfile import SettingsError

FILE = "/etc/here.toml"

ABOVE_0 = (math.ulp(0.0), 86_400.0)
KINDS: dict[str, Any] = {
    "socket_path": "path",
    "log.level": ("error", "warning", "info", "debug", "io", "console"),
    "log.format": ("auto", "json", "text"),
    "vm.ready_timeout": ABOVE_0,
    "vm.bye_linger": (0.0, 86_400.0),
    "stdin.echo_timeout": ABOVE_0,
    "stdin.window": (0, 1_048_576),
    "spool.directory": "path",
    "spool.session_limit": (0, 2**50),
    "limits.vms": (1, 1_000_000),
    "limits.message_timeout": ABOVE_0,
}

characters = st.characters(codec="utf-8")
numbers = st.integers(-10, 10) | st.integers() | st.floats(-1, 90_000) | st.floats()
dates = st.dates() | st.times() | st.datetimes()
words = st.text(characters) | st.text(characters).map(lambda text: f"/{text}")
words |= st.sampled_from(["info", "io", "console", "json", "auto", "INFO", "", "/", "/var/tmp"])
leaves = words | numbers | st.booleans() | dates
tables = st.text(characters, max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tables, inner, max_size=3),
    max_leaves=5,
)


def toml(value: Any) -> str:
    """How TOML spells a value."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{toml(key)}={toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime.date | datetime.time | datetime.datetime):
        return value.isoformat()
    return repr(value)


def is_right(kind: Any, value: Any) -> bool:
    """Whether a setting of this kind may have this value, as conf/cc-proxy.toml puts it."""
    if kind == "path":
        return isinstance(value, str) and value.startswith("/") and "\0" not in value
    low, high = kind[0], kind[-1]
    if isinstance(low, str):
        return value in kind
    if isinstance(value, bool) or not isinstance(value, int if isinstance(low, int) else int | float):
        return False
    return bool(low <= value <= high)


def refusal(text: str) -> str:
    """Why these settings are refused: one line. Empty if they are taken."""
    try:
        parse(text, FILE)
    except SettingsError as error:
        said = str(error)
        assert said.startswith(f"{FILE}: ")
        assert said.isprintable()
        return said.removeprefix(f"{FILE}: ")
    return ""


@given(st.sampled_from(sorted(KINDS)), values)
@example("socket_path", "/" + "é" * 60)
@example("vm.ready_timeout", math.nan)
@example("vm.bye_linger", -0.0)
@example("stdin.window", 5.0)
@example("limits.vms", True)
def test_any_value_is_taken_or_refused_by_the_name_of_its_key(key: str, value: Any) -> None:
    text = f"{key} = {toml(value)}\n"
    right = is_right(KINDS[key], value) and (key != "socket_path" or len(value.encode()) <= 107)
    if not right:
        assert refusal(text).startswith((f"{key}: ", "not valid TOML: "))
        return
    found: Any = parse(text, FILE)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


@given(st.sampled_from(["", "log.", "vm.", "limits."]), st.text(characters, max_size=20), leaves)
@example("", "a\nb", 1)
@example("vm.", "\x1b[31m", 1)
def test_keys_that_nobody_knows_are_named(table: str, key: str, value: Any) -> None:
    """In one line that does nothing to a terminal, whatever is in them."""
    if table + key not in KINDS and table + key + "." not in {
        f"{known.partition('.')[0]}." for known in KINDS
    }:
        said = refusal(f"{table}{toml(key)} = {toml(value)}\n")
        assert said.startswith(table and f"{table[:-1]}: ")
        assert not key.isprintable() or key in said


@given(
    st.text(characters, max_size=300)
    | st.lists(words | st.sampled_from("[]={}.#\"'\n"), max_size=20).map("".join)
)
def test_any_text_is_settings_or_refused(text: str) -> None:
    refusal(text)
