"""The man pages and completion that packages install: whole, and taken by those who read them."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cc_proxy.cli import ctl, daemon
from cc_proxy.ctl.commands import COMMANDS
from tests.test_settings import DEFAULTS

DOCS = Path(__file__).parent.parent.parent / "packaging" / "docs.py"
PARSERS = {"cc-proxy.8": daemon.build_parser, "cc-proxyctl.1": ctl.build_parser}
PAGES = [*PARSERS, "cc-proxy.toml.5"]
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
