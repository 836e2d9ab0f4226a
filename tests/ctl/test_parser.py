"""The command line, and what is made of it."""

from __future__ import annotations

import os
from typing import Any

import pytest

import cc_proxy
from cc_proxy.cli.ctl import build_parser, main
from cc_proxy.ctl import options
from cc_proxy.ctl.commands import COMMANDS
from cc_proxy.ctl.errors import Misuse
from cc_proxy.ctl.options import ProcessOptions, environment_variables

LOCAL = ["run", "--local"]


def read(argv: list[str]) -> Any:
    """Return the typed options of a command line."""
    args = build_parser().parse_args(argv)
    return args.main.__self__.read(args)


def complaint(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Return the last line of what is said about a command line that makes no sense."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err.splitlines()[-1]


def test_run_with_everything() -> None:
    line = """--socket-path /p run --ctl c --io /i --console con --id ID -ti -e A=1 --env B=x=y -e A=2 -w /d
        -u me:us --timeout 1.5 -- sh -c -t --"""
    asked = read(line.split())
    assert asked == options.RunOptions(
        proxy=options.ProxyOptions("/p", 1.5),
        container_id="ID",
        vm=options.VmSockets(os.path.abspath("c"), "/i", os.path.abspath("con")),
        console=os.path.abspath("con"),
        process=ProcessOptions(
            ("sh", "-c", "-t", "--"),
            terminal=True,
            interactive=True,
            env=(("A", "2"), ("B", "x=y")),
            workdir="/d",
            user="me",
            group="us",
        ),
    )


def test_run_with_the_least() -> None:
    asked = read([*LOCAL, "true"])
    assert asked.vm is None
    assert asked.process == ProcessOptions(("true",))


def test_an_id_is_made_up() -> None:
    first, second = (read([*LOCAL, "true"]).container_id for _ in range(2))
    assert first != second
    assert len(first) == 12


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        pytest.param(["--", "ls", "-l"], ("ls", "-l"), id="dashes"),
        pytest.param(["ls", "-l"], ("ls", "-l"), id="no dashes"),
        pytest.param(["ls", "-t", "--id", "x"], ("ls", "-t", "--id", "x"), id="options like ours"),
        pytest.param(["ls", "--", "-l"], ("ls", "--", "-l"), id="dashes of the command's own"),
        pytest.param(["--", "-x"], ("-x",), id="a command that looks like an option"),
        pytest.param(["--", "sh", "-c", "a; b"], ("sh", "-c", "a; b"), id="blanks"),
        pytest.param(["--", "echo", ""], ("echo", ""), id="empty argument"),
    ],
)
@pytest.mark.parametrize("before", [LOCAL, ["exec", "ID"], ["exec", "-i", "ID"]], ids=" ".join)
def test_all_after_the_first_word_is_the_command(
    before: list[str], argv: list[str], command: tuple[str, ...]
) -> None:
    asked = read([*before, *argv])
    assert asked.process.args == command
    assert not asked.process.terminal


@pytest.mark.parametrize(
    ("user", "expected"),
    [("u", ("u", "")), ("u:g", ("u", "g")), (":g", ("", "g")), ("1:2", ("1", "2")), ("", ("", ""))],
)
def test_user_and_group(user: str, expected: tuple[str, str]) -> None:
    process = read([*LOCAL, "-u", user, "id"]).process
    assert (process.user, process.group) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["A=1"], {"A": "1"}),
        (["A="], {"A": ""}),
        (["A=b=c"], {"A": "b=c"}),
        (["A=1", "A=2"], {"A": "2"}),
        (["HERE"], {"HERE": "there"}),
        (["HERE="], {"HERE": ""}),
        (["NOWHERE"], {}),
    ],
    ids=str,
)
def test_environment(settings: list[str], expected: dict[str, str]) -> None:
    assert environment_variables(settings, {"HERE": "there"}) == expected


@pytest.mark.parametrize("setting", ["", "=x"])
def test_a_variable_without_a_name(setting: str) -> None:
    with pytest.raises(Misuse, match="needs a name"):
        environment_variables([setting], {})


@pytest.mark.parametrize(
    ("argv", "variable", "expected"),
    [
        ([], None, "/run/cc-oci-runtime/proxy.sock"),
        ([], "", "/run/cc-oci-runtime/proxy.sock"),
        ([], "/env", "/env"),
        (["--socket-path", "/opt"], "/env", "/opt"),
    ],
)
def test_the_socket(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], variable: str | None, expected: str
) -> None:
    monkeypatch.delenv("CC_PROXY_SOCKET", raising=False)
    if variable is not None:
        monkeypatch.setenv("CC_PROXY_SOCKET", variable)
    assert read([*argv, "bye", "ID"]).proxy.socket_path == expected


@pytest.mark.parametrize(
    ("argv", "complaint_about"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["run"], "run needs --local, --vm, or both --ctl and --io"),
        (["run", "true"], "run needs --local, --vm, or both --ctl and --io"),
        (["run", "--ctl", "c", "true"], "run needs --local, --vm, or both --ctl and --io"),
        (["run", "--local", "--io", "i", "true"], "--local and --vm have sockets of their own"),
        (LOCAL, "there is no command"),
        ([*LOCAL, "--"], "there is no command"),
        (["exec", "ID"], "there is no command"),
        ([*LOCAL, "--", "", "x"], "the command to start is empty: ''"),
        (["exec"], "required: ID"),
        ([*LOCAL, "-e", "=1", "true"], "-e =1: a variable needs a name"),
        ([*LOCAL, "--timeout", "0", "true"], "'0' is not a number of seconds"),
        ([*LOCAL, "--timeout", "nan", "true"], "'nan' is not a number of seconds"),
        ([*LOCAL, "--timeout", "soon", "true"], "'soon' is not a number of seconds"),
        ([*LOCAL, "--time", "1", "true"], "unrecognized arguments: --time"),
        (["hello", "ID", "--ctl", "c"], "required: --io"),
        (["hyper", "ID"], "required: NAME"),
        (["hyper", "ID", "ping", "{"], "this is not JSON: "),
        (["hyper", "ID", "ping", ""], "this is not JSON: "),
        (["hyper", "ID", "ping", "[" * 100_000], "this is not JSON: "),
        (["bye", os.fsdecode(b"\xff")], "argument ID: not valid UTF-8"),
        (["bye"], "required: ID"),
        (["bye", ""], "argument ID: a container id has at least one character"),
        (["run", "--local", "--id=", "true"], "argument --id: a container id has at least one character"),
        (
            ["run", "--local", "--id", "x" * 5000, "true"],
            "a container id has at most 256 characters, this one has 5000",
        ),
        (["agent", "--ctl", "c", "--io", "i", "--ready-fd", "-1"], "'-1' is not the number of an fd"),
        (["agent", "--ctl", "c", "--io", "i", "--ready-fd", "9" * 20], "is not the number of an fd"),
        (["agent", "--ctl", "c", "--io", "i", "--ready-fd", "x"], "'x' is not the number of an fd"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_makes_no_sense(
    capsys: pytest.CaptureFixture[str], argv: list[str], complaint_about: str
) -> None:
    line = complaint(capsys, argv)
    assert line.startswith("cc-proxyctl")
    assert complaint_about in line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cc-proxyctl {cc_proxy.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [command.name for command in COMMANDS if f"\n    {command.name} " not in printed] == []
    assert "CC_PROXY_SOCKET" in printed
    assert "CC_PROXY_GUEST" in printed


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_are_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    assert main([command.name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert len(command.examples) > 0
    for example in command.examples:
        assert f"\n  cc-proxyctl {example}\n" in printed
        assert example.split()[0] in (command.name, *command.aliases)
