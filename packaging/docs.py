"""Makes the man pages, and the completion of bash, zsh and fish: docs.py DIRECTORY.

The options come from the parsers of the two programs, the settings from the files in conf, and the other
sections, written by hand, from packaging/man. Needs argparse-manpage, shtab, and the package itself.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

import cc_proxy
from cc_proxy.cli import ctl, daemon
from cc_proxy.ctl.commands import COMMANDS

HERE = Path(__file__).parent
CONF = HERE.parent / "conf"

SUMMARIES = {
    "cc-proxy": "share the channels of virtual machine containers among their clients",
    "cc-proxyctl": "talk to cc-proxy by hand",
    "cc-proxy.toml": "settings of cc-proxy",
    "cc-proxy-guest.toml": "settings of the virtual machines that cc-proxyctl starts",
}
COMPLETED = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY}
#: The name that each shell expects of the file for a program.
COMPLETION_FILES = {"bash": "{}.bash", "zsh": "_{}", "fish": "{}.fish"}

_SETTING = re.compile(r"#?([a-z_]+) = (.+)")
_TABLE = re.compile(r"#?\[([a-z_.]+)\]")


def main(directory: Path) -> None:
    """Write all files into a directory; makes it if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files():
        (directory / name).write_text(text)


def files() -> Iterator[tuple[str, str]]:
    """Yield each file's name and text."""
    for build, section in ((daemon.build_parser, 8), (ctl.build_parser, 1)):
        program = build().prog
        yield f"{program}.{section}", program_page(build(), section)
        for shell, name in COMPLETION_FILES.items():
            yield name.format(program), completion(build(), shell)
    for name, file in (("cc-proxy.toml", "cc-proxy.toml"), ("cc-proxy-guest.toml", "guest.toml")):
        yield f"{name}.5", settings_page(name, (CONF / file).read_text())


def program_page(parser: argparse.ArgumentParser, section: int) -> str:
    """Return the man page of a program."""
    parser.epilog = None  # the sections in packaging/man say it, in more detail
    name = f"{parser.prog}.{section}"
    data = {
        "project_name": "cc-proxy",
        "version": cc_proxy.__version__,
        "description": SUMMARIES[parser.prog],
        "manual_section": section,
        "manual_title": "cc-proxy",
        "include": str(HERE / "man" / f"{name}.include"),
    }
    page = str(Manpage(parser, data, format="single-commands-section"))
    if parser.prog == "cc-proxyctl":
        page = page.replace(".SH EXIT STATUS", f"{_examples()}.SH EXIT STATUS", 1)
    return page.replace(
        _date().replace("-", r"\-"), _date(), 1
    )  # mandoc reads no date with troff's minus signs


def _examples() -> str:
    """Return a section with the examples from the help of each command."""
    lines = (f"cc-proxyctl {example}" for command in COMMANDS for example in command.examples)
    return "\n".join((".SH EXAMPLES", ".EX", *map(_escaped, lines), ".EE", ""))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script with which a shell completes a program's options, commands and file names."""
    for action in _actions(parser):
        if action.metavar in COMPLETED:
            action.complete = COMPLETED[action.metavar]  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def settings_page(name: str, toml: str) -> str:
    """Return the man page of a file of settings, made from the comments in the one that is shipped."""
    about, *blocks = re.split(r"\n{2,}", toml.strip())
    title = _escaped(name.upper())
    page = [f'.TH {title} "5" "{_date()}" "cc\\-proxy {cc_proxy.__version__}" "cc\\-proxy"']
    page += [".SH NAME", f"{_escaped(name)} \\- {SUMMARIES[name]}", ".SH DESCRIPTION"]
    page += [_prose(line) for line in about.splitlines()]
    page += [".SH SETTINGS"]
    for block in blocks:
        page += _setting_or_table(block.splitlines())
    return "\n".join((*page, (HERE / "man" / f"{name}.5.end").read_text()))


def _setting_or_table(block: list[str]) -> Iterator[str]:
    """Yield the page's lines for a table or settings, or both, and the comments above them."""
    comments: list[str] = []
    for line in block:
        if table := _TABLE.fullmatch(line):
            yield f".SS [{_escaped(table[1])}]"
            yield from comments
            comments = []
        elif setting := _SETTING.fullmatch(line):
            yield from (".TP", rf"\fB{_escaped(setting[1])}\fR = {_escaped(setting[2])}", *comments)
            comments = []
        else:
            comments.append(_prose(line))
    yield from comments


def _prose(comment: str) -> str:
    text = comment.removeprefix("#").strip()
    # troff would take a line that begins with a dot or a quote for a request.
    return re.sub(r"^(?=[.'])", r"\\&", _escaped(text)) if text else ".PP"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\e").replace("-", r"\-")


def _date() -> str:
    """Return the date of the build, or SOURCE_DATE_EPOCH's if the build must be reproducible."""
    now = time.time()  # noqa: TID251 - it is a date
    return datetime.fromtimestamp(float(os.environ.get("SOURCE_DATE_EPOCH", now)), UTC).strftime("%F")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
