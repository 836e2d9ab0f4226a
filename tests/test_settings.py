"""Settings: what is taken, and that whatever is not is named with its file, its key and what was expected."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from cc_proxy import settings
from cc_proxy.settings import LiveSettings, Settings, load, parse
from cc_proxy.settingsfile import SettingsError

FILE = "/etc/here.toml"
LEVELS = ["error", "warning", "info", "debug", "io", "console"]
FORMATS = ["auto", "json", "text"]

SECONDS = [
    "vm.ready_timeout",
    "vm.ready_ping_after",
    "vm.command_timeout",
    "vm.bye_linger",
    "stdin.echo_timeout",
    "limits.message_timeout",
]
COUNTS = [
    f"{table}.{name}"
    for table in ("limits", "limits.user")
    for name in ("connections", "vms", "sessions", "commands")
] + ["limits.user.request_rate"]
BYTES = [
    "spool.session_limit",
    "spool.user_limit",
    "spool.total_limit",
    "limits.request_bytes",
    "limits.user.request_bytes",
]
INTEGERS = ["stdin.window", *BYTES, *COUNTS]
PATHS = ["socket_path", "spool.directory"]
CHOICES = ["log.level", "log.format"]
MEMBERS = ["access.users", "access.groups", "access.admins"]
TABLES = ["access", "log", "vm", "stdin", "spool", "limits", "limits.user"]

DEFAULTS = {
    "socket_path": "/run/cc-oci-runtime/proxy.sock",
    "access.users": (),
    "access.groups": (os.getegid(),),
    "access.admins": (),
    "log.level": "info",
    "log.format": "auto",
    "vm.ready_timeout": 30.0,
    "vm.ready_ping_after": 5.0,
    "vm.command_timeout": 60.0,
    "vm.bye_linger": 10.0,
    "stdin.window": 512,
    "stdin.echo_timeout": 0.1,
    "spool.directory": "/var/tmp",
    "spool.session_limit": 64 * 1024 * 1024,
    "spool.user_limit": 512 * 1024 * 1024,
    "spool.total_limit": 1024 * 1024 * 1024,
    "limits.connections": 16_384,
    "limits.vms": 1_024,
    "limits.sessions": 32_768,
    "limits.commands": 8_192,
    "limits.request_bytes": 256 * 1024 * 1024,
    "limits.user.connections": 1_024,
    "limits.user.vms": 64,
    "limits.user.sessions": 2_048,
    "limits.user.commands": 512,
    "limits.user.request_bytes": 16 * 1024 * 1024,
    "limits.user.request_rate": 100,
    "limits.message_timeout": 30.0,
}


def value(of: Settings, key: str) -> object:
    found: object = of
    for name in key.split("."):
        found = getattr(found, name)
    return found


def values(of: Settings) -> dict[str, object]:
    return {key: value(of, key) for key in DEFAULTS}


def refusal(text: str) -> str:
    """The text of the error, without the file that it names first."""
    try:
        parse(text, FILE)
    except SettingsError as error:
        message = str(error)
        assert message.startswith(f"{FILE}: ")
        return message.removeprefix(f"{FILE}: ")
    pytest.fail(f"taken: {text}")


# What is taken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "[log]\n[vm]\n[stdin]\n[spool]\n[limits]\n"])
def test_everything_has_a_default(text: str) -> None:
    assert values(parse(text, FILE)) == DEFAULTS


def test_there_are_no_settings_but_these() -> None:
    """So that a new one comes with tests."""
    names = {
        f"{table}.{name}"
        for table in TABLES
        for name in value(Settings(), table).__struct_fields__  # type: ignore[attr-defined]
    }
    assert names - {"limits.user"} | {"socket_path"} == set(DEFAULTS)
    assert set(Settings.__struct_fields__) == {"socket_path", *TABLES} - {"limits.user"}
    assert {*SECONDS, *INTEGERS, *PATHS, *CHOICES, *MEMBERS} == set(DEFAULTS)


SPELLINGS_OF_SECONDS = {"1": 1.0, "0.001": 0.001, "86400": 86_400.0, "86_400.0": 86_400.0}
GOOD: list[tuple[str, Mapping[str, object]]] = [
    ("socket_path", {'"/"': "/", '"/run/é"': "/run/é"}),
    ("spool.directory", {"'/tmp'": "/tmp"}),
    ("access.users", {"[]": (), '["root", 1000]': (0, 1000)}),
    ("access.groups", {"[]": (), '["@daemon", "root", 4294967294]': (os.getegid(), 0, 2**32 - 2)}),
    ("access.admins", {'["root"]': (0,)}),
    ("log.level", {f'"{level}"': level for level in LEVELS}),
    ("log.format", {f'"{name}"': name for name in FORMATS}),
    *((key, SPELLINGS_OF_SECONDS) for key in SECONDS),
    ("vm.bye_linger", {"0": 0.0, "0.0": 0.0}),
    ("stdin.window", {"0": 0, "0x200": 512, "1_048_576": 1_048_576}),
    *((key, {"0": 0, "1125899906842624": 2**50}) for key in BYTES),
    *((key, {"1": 1, "1000000": 1_000_000}) for key in COUNTS),
]


def test_a_setting_changes_itself_and_nothing_else() -> None:
    for key, spellings in GOOD:
        for written, expected in spellings.items():
            got = parse(f"{key} = {written}", FILE)
            assert values(got) == {**DEFAULTS, key: expected}
            assert type(value(got, key)) is type(DEFAULTS[key])


def test_all_at_once() -> None:
    text = """
        socket_path = "/a"
        [access]
        users = [1]
        groups = [2]
        admins = [3]
        [log]
        level = "debug"
        format = "json"
        [vm]
        ready_timeout = 1
        ready_ping_after = 2
        command_timeout = 3
        bye_linger = 4
        [stdin]
        window = 5
        echo_timeout = 6
        [spool]
        directory = "/b"
        session_limit = 7
        user_limit = 8
        total_limit = 9
        [limits]
        connections = 10
        vms = 11
        sessions = 12
        commands = 13
        request_bytes = 14
        message_timeout = 21
        [limits.user]
        connections = 15
        vms = 16
        sessions = 17
        commands = 18
        request_bytes = 19
        request_rate = 20
    """
    expected = ["/a", (1,), (2,), (3,), "debug", "json", 1, 2, 3, 4, 5, 6, "/b", *range(7, 21), 21]
    assert list(values(parse(text, FILE)).values()) == expected


def test_settings_do_not_change() -> None:
    got = parse("", FILE)
    with pytest.raises(AttributeError):
        got.socket_path = "/x"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        got.log.level = "debug"  # type: ignore[misc]


# What is not ------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_its_table() -> None:
    names = ("unknown", "Level", "ready-timeout", "socket_path ", "")
    for table, name in itertools.product(["", *TABLES], names):
        message = refusal(f'[{table}]\n"{name}" = 1' if table else f'"{name}" = 1')
        assert f"`{name}`" in message
        assert "unknown" in message
        assert message.startswith(f"{table}: unknown setting" if table else "unknown setting")


def test_an_unknown_table_is_named() -> None:
    assert "`logs`" in refusal('[logs]\nlevel = "info"')


TYPES = {
    "string": '"1"',
    "integer": "1",
    "float": "1.0",
    "boolean": "true",
    "array": "[1]",
    "table": "{ x = 1 }",
    "date": "1979-05-27",
    "time": "07:32:00",
    "moment": "1979-05-27T07:32:00Z",
}


@pytest.mark.parametrize(
    ("keys", "right", "expected"),
    [
        (SECONDS, {"integer", "float"}, "a number"),
        (INTEGERS, {"integer"}, "an integer"),
        (PATHS, {"string"}, "a string"),
        (CHOICES, {"string"}, "a string"),
        (TABLES, {"table"}, "a table"),
    ],
    ids=["numbers", "integers", "paths", "choices", "tables"],
)
def test_a_value_of_another_type_is_named_with_the_type_that_was_expected(
    keys: list[str], right: set[str], expected: str
) -> None:
    for key in keys:
        for kind in TYPES.keys() - right:
            assert refusal(f"{key} = {TYPES[kind]}").startswith(f"{key}: expected {expected}, got ")


def test_a_table_is_one_table() -> None:
    for table in TABLES:
        assert refusal(f"[[{table}]]").startswith(f"{table}: expected a table, got an array")


OUT_OF_RANGE: list[tuple[list[str], list[str], str]] = [
    ([key for key in SECONDS if key != "vm.bye_linger"], ["0", "0.0", "-1", "-0.1", "-inf", "nan"], "> 0"),
    (["vm.bye_linger"], ["-1", "-0.001", "-inf", "nan"], ">= 0"),
    (SECONDS, ["86400.1", "86401", "1e300", "inf"], "<= 86400"),
    (["stdin.window", "spool.session_limit", "spool.total_limit"], ["-1", str(-(10**30))], ">= 0"),
    (["stdin.window"], ["1_048_577", str(10**30)], "<= 1048576"),
    (["spool.session_limit", "spool.total_limit"], [str(2**50 + 1), str(10**30)], f"<= {2**50}"),
    (COUNTS, ["0", "-1", str(-(10**30))], ">= 1"),
    (COUNTS, ["1000001", str(10**30)], "<= 1000000"),
]


def test_a_number_out_of_range_is_named_with_the_limit() -> None:
    for keys, spellings, expected in OUT_OF_RANGE:
        for key, written in itertools.product(keys, spellings):
            message = refusal(f"{key} = {written}")
            assert message.startswith(f"{key}: expected a")
            assert expected in message


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('access.admins = ["@daemon", "@others"]', "access.admins: there is no group '@others'"),
        ('access.users = ["@daemon"]', "access.users: there is no user '@daemon'"),
        ('access.users = ["a\\u0000b"]', r"access.users: there is no user 'a\x00b'"),
        ('access.users = [""]', "access.users: there is no user ''"),
        ("access.users = [-1]", "access.users: -1 is no user's number"),
        ("access.groups = [4294967295]", "access.groups: 4294967295 is no group's number"),
        ("access.users = [true]", "access.users: expected a user's name or number, got True"),
        ("access.groups = [[]]", "access.groups: expected a group's name or number, got []"),
        ('access.users = "root"', "access.users: expected an array, got a string"),
        ("access.owners = []", "access: unknown setting `owners`"),
    ],
)
def test_what_can_be_no_user_and_no_group_is_refused(text: str, error: str) -> None:
    assert refusal(text) == error


@pytest.mark.parametrize("key", PATHS)
def test_a_path_is_absolute(key: str) -> None:
    for written in ("", "run/x", "./x", " /x", "~/x", "/x\\u0000", "\\u0000/x"):
        message = refusal(f'{key} = "{written}"')
        assert message.startswith(f"{key}: ")
        assert "absolute path" in message


def test_a_socket_path_is_no_longer_than_a_socket_can_have() -> None:
    longest = "/" + "x" * 106
    assert parse(f'socket_path = "{longest}"', FILE).socket_path == longest
    message = refusal(f'socket_path = "{longest}x"')
    assert message.startswith("socket_path: ")
    assert "107" in message


@pytest.mark.parametrize(("key", "choices"), [("log.level", LEVELS), ("log.format", FORMATS)])
def test_a_choice_is_named_with_what_there_is_to_choose_from(key: str, choices: list[str]) -> None:
    for written in ("", "INFO", "Auto", " info", "none", "jso", "x" * 100):
        message = refusal(f'{key} = "{written}"')
        assert message.startswith(f"{key}: ")
        assert f"'{written}'" in message
        assert all(choice in message for choice in choices)


def test_nothing_counts_of_a_file_that_is_not_right() -> None:
    refusal('[log]\nlevel = "debug"\n[limits]\nvms = 0')


def test_what_is_no_toml_is_named_with_its_place() -> None:
    for text, place in (
        ("socket_path", "end of document"),
        ("socket_path = ", "end of document"),
        ("\n\nsocket_path = /run", "line 3"),
        ("[log\nlevel = 1", "line 1"),
        ("[log]\n[log]", "line 2"),
        ('[log]\nlevel = "info"\nlevel = "info"', "end of document"),
        ("log.level = 'info'\n[log]", "line 2"),
        ("socket_path = '/a\0'", "line 1"),
        ('socket_path = "/a\\ud800"', "line 1"),
        ("\ufeff", "line 1"),
        ("vm.ready_timeout = 1979-13-01", "line 1"),
        ("{}", "line 1"),
    ):
        message = refusal(text)
        assert message.startswith("not valid TOML: ")
        assert place in message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x = " + "[" * 200_000, id="200,000 brackets"),
        pytest.param("x = " + "[" * 200_000 + "]" * 200_000, id="200,000 arrays"),
        pytest.param("x = " + "{x=" * 200_000, id="200,000 tables"),
        pytest.param("stdin.window = " + "9" * 5_000, id="5,000 digits"),
        pytest.param("vm.ready_timeout = " + "9" * 5_000, id="5,000 digits of seconds"),
    ],
)
def test_what_a_toml_parser_chokes_on_is_refused_like_anything_else(text: str) -> None:
    assert len(refusal(text)) < 1_000


# Files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "default.toml"
    monkeypatch.setattr(settings, "DEFAULT_FILE", str(path))
    return path


def test_the_default_file_is_this() -> None:
    assert settings.DEFAULT_FILE == "/etc/cc-proxy/cc-proxy.toml"


def test_without_a_default_file_there_are_the_defaults(default_file: Path) -> None:
    assert values(load()) == DEFAULTS


def test_the_default_file_counts_if_no_other_was_named(default_file: Path, tmp_path: Path) -> None:
    default_file.write_text("limits.vms = 1")
    other = tmp_path / "other.toml"
    other.write_text("limits.connections = 2")
    assert values(load()) == {**DEFAULTS, "limits.vms": 1}
    assert values(load(str(other))) == {**DEFAULTS, "limits.connections": 2}


def test_a_default_file_that_is_not_right_is_an_error(default_file: Path) -> None:
    default_file.write_text("limits.vms = 0")
    with pytest.raises(SettingsError, match=r"^.*default\.toml: limits\.vms: expected an integer >= 1$"):
        load()


def test_a_file_that_was_named_has_to_be_there(default_file: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "none.toml")
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    """And nobody waits for somebody to write into it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (str(pipe), os.devnull):
        with pytest.raises(SettingsError, match="cannot be read: not a regular file"):
            load(path)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize("content", [b"socket_path = '/\xff'", "socket_path = '/x'".encode("utf-16")])
def test_a_file_is_utf_8(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load(str(path))
    assert str(caught.value) == f"{path}: cannot be read: not UTF-8"


def test_a_file_may_have_other_line_ends_and_letters(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes("# é\r\n[spool]\r\ndirectory = '/é'\r\n".encode())
    assert load(str(path)).spool.directory == "/é"


# While the daemon runs --------------------------------------------------------------------------------------

#: Another value for each setting.
OTHERS: dict[str, str] = {
    **dict.fromkeys(SECONDS, "7"),
    **dict.fromkeys(INTEGERS, "7"),
    **dict.fromkeys(PATHS, '"/other"'),
    "log.level": '"debug"',
    "log.format": '"text"',
}


def test_each_setting_changes_or_waits_for_a_restart() -> None:
    waiting = {"socket_path", "log.format", "spool.directory"}
    for key, written in OTHERS.items():
        live = LiveSettings(Settings())
        new = parse(f"{key} = {written}", FILE)
        reload = live.replace(new)
        change = {key: (DEFAULTS[key], value(new, key))}
        if key in waiting:
            assert (reload.changed, reload.waiting) == ({}, change)
            assert values(live.current) == DEFAULTS
        else:
            assert (reload.changed, reload.waiting) == (change, {})
            assert live.current == new


def test_a_user_that_nobody_knows_is_shown_as_it_was_written() -> None:
    live = LiveSettings(parse('access.users = ["nobody-at-all", 7]', FILE))
    changed = live.replace(parse('access.users = ["no-other-either", 7]', FILE)).changed
    assert changed == {"access.users": (("nobody-at-all", 7), ("no-other-either", 7))}


def test_what_waits_is_said_each_time_and_what_has_changed_once() -> None:
    live = LiveSettings(Settings())
    new = parse('limits.vms = 5\nspool = { directory = "/other", total_limit = 3 }', FILE)
    assert live.replace(new).changed == {"limits.vms": (1024, 5), "spool.total_limit": (1 << 30, 3)}
    again = live.replace(new)
    assert again.changed == {}
    assert again.waiting == {"spool.directory": ("/var/tmp", "/other")}
    assert live.replace(Settings()).waiting == {}
    assert live.current == Settings()


def test_settings_that_were_taken_do_not_change() -> None:
    live = LiveSettings(Settings())
    taken = live.current
    live.replace(parse("limits.vms = 5", FILE))
    assert taken == Settings()
    assert live.current.limits.vms == 5
