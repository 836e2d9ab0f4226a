"""The text of a settings file.

`SettingsError` may be raised: one printable line that begins with the file's name.
"""

from __future__ import annotations

from cc_proxy.settings import LiveSettings, Settings, parse
from cc_proxy.settingsfile import SettingsError
from tests.fuzz.choices import Choices

_FILE = "/etc/here.toml"
_TABLES = (
    "",
    "log.",
    "vm.",
    "stdin.",
    "spool.",
    "limits.",
    "[log]\n",
    "[vm]\n",
    "[[vm]]\n",
    "[limits",
    '"a\\nb".',
)
_KEYS = (
    "socket_path", "level", "format", "ready_timeout", "ready_ping_after", "command_timeout", "bye_linger",
    "window", "echo_timeout", "directory", "session_limit", "total_limit", "connections", "vms",
    "message_timeout", "unknown", '"\\u001b"',
)  # fmt: skip
_VALUES = (
    '"info"', '"json"', '"/x"', '"x"', '"/\\u0000"', '"""/\n"""', "'/é'", "0", "1", "-1", "1e9", "0.5", "inf",
    "-nan", "0x1F", "1_000", "1979-05-27", "07:32:00", "true", "[1]", "[[]]", "{}", "{a=1}", "",
    "9" * 5000, '"/' + "é" * 60 + '"',
)  # fmt: skip


def run(choices: Choices) -> None:
    """A text is settings, which then count, or it is refused in a way that a person can read."""
    text = "".join(choices.some(12, lambda: _line(choices)))
    try:
        settings = parse(text, _FILE)
    except SettingsError as error:
        assert str(error).startswith(f"{_FILE}: ")
        assert str(error).isprintable()
        return
    live = LiveSettings(Settings())
    reload = live.replace(settings)
    assert not reload.changed.keys() & reload.waiting.keys()
    assert not LiveSettings(settings).replace(settings).changed


def _line(choices: Choices) -> str:
    kind = choices.number(5)
    if kind == 0:
        return choices.raw(60).decode(errors="replace") + "\n"
    if kind == 1:
        return "[" * choices.number(255) + choices.pick(_VALUES)
    value = choices.pick(_VALUES) if kind > 2 else f'"{choices.raw(30).decode(errors="replace")}"'
    return f"{choices.pick(_TABLES)}{choices.pick(_KEYS)} = {value}\n"
