"""The corpus, run again without the fuzzer; and that a target notices what is wrong."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from cc_proxy import settingsfile
from cc_proxy.agent.inbound import HostFrames
from cc_proxy.api import fdpassing
from cc_proxy.api.errors import ProtocolError
from cc_proxy.api.messages import MessageParser
from cc_proxy.ctl import overview
from cc_proxy.hyperstart import frames, splitter
from cc_proxy.hyperstart.control import ControlChannel
from cc_proxy.hyperstart.pacing import StdinWindow
from cc_proxy.proxy.clients import handlers, outgoing
from cc_proxy.proxy.vms.console import LineSplitter
from tests.fuzz.__main__ import main
from tests.fuzz.choices import Choices, in_pieces
from tests.fuzz.inputs import DIRECTORY, read, write
from tests.fuzz.targets import TARGETS, load


def replay(target: str) -> None:
    run = load(target)
    for data in read(target):
        run(Choices(data))


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_finds_nothing(target: str) -> None:
    assert len(read(target)) > 1
    replay(target)


def test_corpus_is_small_and_has_no_others() -> None:
    assert {path.stem for path in DIRECTORY.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 100_000


def test_named_inputs_stay(tmp_path: Path) -> None:
    (tmp_path / "frames.txt").write_text("long 0102\n03\n")
    assert read("frames", tmp_path) == [b"\1\2", b"\3"]
    assert write("frames", [b"\5\6", b"\1\2", b"\4"], tmp_path) == 3
    assert (tmp_path / "frames.txt").read_text() == "long 0102\n04\n0506\n"


def test_file_is_replayed_for_the_target_that_its_directory_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pacing" / "crash"
    file.parent.mkdir()
    file.write_bytes(b"\1" * 40)
    assert main(["--replay", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: nothing wrong\n"


def test_no_fuzzer_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("fuzz: skipped: atheris is not installed")


# What is broken on purpose is found by the corpus.


@pytest.mark.parametrize(
    ("target", "owner", "name", "broken"),
    [
        ("agent", HostFrames, "_fits", lambda *_: True),
        ("console", LineSplitter, "finish", lambda _: []),
        ("control", ControlChannel, "unanswered", 0),
        ("fds", fdpassing, "TAG", b"?"),
        ("frames", frames, "alike", lambda _, pos, length, stop, first=0: (stop - pos) // length),
        ("messages", MessageParser, "missing", 8),
        ("pacing", StdinWindow, "_seq", 1 << 63),
        ("requests", handlers, "MAX_RESPONSE", 1 << 20),
        ("requests", outgoing, "TAG", b"G"),
        ("settings", settingsfile, "printable", str),
        ("status", overview, "printable", str),
        ("stdin", splitter, "MAX_TO_AGENT", 4_097),
    ],
)
def test_what_is_wrong_is_found(
    target: str, owner: object, name: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(target)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, ProtocolError, struct.error)):
        replay(target)


# Choices ------------------------------------------------------------------------------------------------


def test_the_same_bytes_are_the_same_choices() -> None:
    choices = Choices(bytes([3, 1, 200, 4]) + b"seed" + bytes([0]))
    assert choices.number(255) == 3
    assert choices.yes()
    assert choices.pick("abc") == "c"
    assert choices.payload() == b"seed"
    assert not choices
    assert (choices.number(99), choices.payload(), choices.some(5, choices.yes)) == (0, b"", [])


def test_number_is_made_of_as_many_bytes_as_it_takes() -> None:
    assert Choices(b"\1\0").number(65_535) == 256
    assert Choices(b"\xff\xff").number(300) == 65_535 % 301


def test_pieces_are_the_whole_and_end() -> None:
    cuts = Choices(bytes([2, 0, 3])).cuts()
    assert list(in_pieces(b"abcdefg", cuts)) == [b"", b"abc", b"", b"def", b"", b"g"]
    assert list(in_pieces(b"abc", Choices(b"").cuts())) == [b"abc"]
