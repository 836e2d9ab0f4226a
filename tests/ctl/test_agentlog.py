"""What an agent has said, found in its log."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cc_proxy.ctl.agentlog import AgentLog, log_name

SAID = "cc-proxy agent: execcmd: no program 'x'\n"


@pytest.fixture
def log(tmp_sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_sock_dir))
    file = tmp_sock_dir / "cc-proxyctl-1" / log_name("pod")
    file.parent.mkdir()
    file.write_text("cc-proxy agent: execcmd: said before\n")
    return file


def test_what_was_said_since(log: Path) -> None:
    since = AgentLog("pod")
    with log.open("a") as file:
        file.write(SAID)
    assert since.reason("execcmd") == SAID.strip()


def test_a_console_that_is_slower_than_the_answer(log: Path) -> None:
    since = AgentLog("pod")
    with log.open("a") as file:
        file.write(SAID[:20])
        file.flush()

        def say_the_rest() -> None:
            file.write(SAID[20:])
            file.flush()

        rest = threading.Timer(0.05, say_the_rest)
        rest.start()
        assert since.reason("execcmd") == SAID.strip()
        rest.join()


def test_a_line_that_never_ends(log: Path) -> None:
    since = AgentLog("pod")
    with log.open("a") as file:
        file.write(SAID.strip())
    assert since.reason("execcmd") == ""


def test_a_vm_without_a_log_is_not_waited_for(log: Path) -> None:
    assert AgentLog("another").reason("execcmd") == ""
