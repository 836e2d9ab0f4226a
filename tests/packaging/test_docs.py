"""The man pages and completion that packages install: whole, and taken by those who read them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from cc_proxy.cli import ctl, daemon
from cc_proxy.ctl.commands import COMMANDS
from tests.test_settings import DEFAULTS

DOCS = Path(__file__).parent.parent.parent / "packaging" / "docs.py"
PARSERS = {"cc-proxy.8": daemon.build_parser, "cc-proxyctl.1": ctl.build_parser}
PAGES = [*PARSERS, "cc-proxy.toml.5", "cc-proxy-guest.toml.5"]
SHELLS = {"bash": "{}.bash", "zsh": "_{}", "fish": "{}.fish"}


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("docs", DOCS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = tmp_path_factory.mktemp("docs")
    module.main(directory)
    return directory


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    # argparse has no other way to ask a parser for its options.
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)


@pytest.mark.parametrize("page", PARSERS)
def test_page_has_every_option(docs: Path, page: str) -> None:
    text = (docs / page).read_text().replace(r"\-", "-")
    options = {option for action in actions(PARSERS[page]()) for option in action.option_strings}
    assert [option for option in options - {"-h", "--help"} if rf"\fB{option}\fR" not in text] == []
    assert all(f".SH {section}\n" in text for section in ("ENVIRONMENT", "EXIT STATUS", "FILES", "SEE ALSO"))


def test_page_has_every_command(docs: Path) -> None:
    text = (docs / "cc-proxyctl.1").read_text().replace(r"\-", "-")
    commands = [command.name for command in COMMANDS]
    assert [name for name in commands if not re.search(rf"\.SS \\fBcc-proxyctl {name}\b", text)] == []


def test_page_has_every_setting(docs: Path) -> None:
    table, found = "", set()
    for line in (docs / "cc-proxy.toml.5").read_text().splitlines():
        if line.startswith(".SS ["):
            table = line.removeprefix(".SS [").removesuffix("]") + "."
        elif line.startswith(r"\fB"):
            found.add(table + line.removeprefix(r"\fB").split(r"\fR")[0])
    assert found == set(DEFAULTS)


def test_page_has_the_examples_of_every_command(docs: Path) -> None:
    text = (docs / "cc-proxyctl.1").read_text()
    found = text.partition(".SH EXAMPLES")[2].partition(".SH")[0].replace(r"\-", "-").splitlines()
    examples = [f"cc-proxyctl {example}" for command in COMMANDS for example in command.examples]
    assert found[2:-1] == examples


@pytest.mark.skipif(not shutil.which("mandoc"), reason="mandoc is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_page_is_right(docs: Path, page: str) -> None:
    result = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", docs / page], check=False, capture_output=True, text=True
    )
    assert (result.stdout, result.returncode) == ("", 0)


@pytest.mark.parametrize("program", ["cc-proxy", "cc-proxyctl"])
@pytest.mark.parametrize("shell", SHELLS)
def test_shell_takes_the_completion(docs: Path, shell: str, program: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", docs / SHELLS[shell].format(program)], check=True)


def test_bash_completes_commands_options_and_choices(docs: Path) -> None:
    assert "hello" in completed_by_bash(docs, "cc-proxyctl", "he")
    assert "--ctl" in completed_by_bash(docs, "cc-proxyctl", "hello", "--c")
    assert "warning" in completed_by_bash(docs, "cc-proxy", "--log-level", "w")


def completed_by_bash(docs: Path, program: str, *words: str) -> list[str]:
    """Returns what bash offers for the last word."""
    script = f"""
        . {docs / program}.bash
        COMP_WORDS=({program} "$@") COMP_CWORD=$#
        _shtab_{program.replace("-", "_")} 2>/dev/null
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    result = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True
    )
    return result.stdout.split()


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_commands_options_and_choices(docs: Path) -> None:
    assert "hello" in completed_by_fish(docs, "cc-proxyctl", "he")
    assert "--ctl" in completed_by_fish(docs, "cc-proxyctl", "hello --c")
    assert "warning" in completed_by_fish(docs, "cc-proxy", "--log-level w")


def completed_by_fish(docs: Path, program: str, words: str) -> list[str]:
    """Returns what fish offers for the last word."""
    script = f"source {docs / program}.fish; complete -C '{program} {words}'"
    result = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
    return [line.split("\t")[0] for line in result.stdout.splitlines()]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes_commands_and_choices(docs: Path) -> None:
    with zsh(docs) as (write, wait_for):
        write("cc-proxyctl hel\t")
        wait_for("cc-proxyctl hello ")
        write("\x15cc-proxy --log-level w\t")  # ^U: what is there is forgotten
        wait_for("cc-proxy --log-level warning ")


@contextmanager
def zsh(docs: Path) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """A zsh that completes on a terminal: what types there, and what waits until something is shown."""
    user, terminal = os.openpty()
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "ZDOTDIR": "/nonexistent"}
    with open(terminal, "r+b", buffering=0) as end, open(user, "r+b", buffering=0) as keyboard:
        command = ["zsh", "--no-rcs", "--interactive"]
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), end)
        with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
            try:
                write, wait_for = partial(type_in, keyboard), partial(wait_until_shown, keyboard)
                write(f"fpath=({docs} $fpath); autoload -Uz compinit; compinit -u -D; PS1='%%> '\n")
                wait_for("\r%> ")
                yield write, wait_for
            finally:
                process.kill()


def type_in(keyboard: FileIO, text: str) -> None:
    keyboard.write(text.encode())


def wait_until_shown(screen: FileIO, text: str) -> None:
    shown = b""
    while text.encode() not in shown:
        assert select.select([screen], [], [], 10)[0], f"not shown: {text!r}, but {shown!r}"
        shown += screen.read(4096)
