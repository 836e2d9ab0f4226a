"""What the agent is sent."""

from __future__ import annotations

from typing import Any

import msgspec

from cc_proxy.ctl.options import ProcessOptions
from cc_proxy.ctl.requests import (
    ExecCmd,
    HyperProcess,
    KillContainer,
    NewContainer,
    StartPod,
    WindowSize,
    WinSize,
    hyper_process,
)

PATH = {"env": "PATH", "value": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
PROCESS = HyperProcess(terminal=False, stdio=1, stderr=2, args=("x",), envs=(), workdir="/")


def sent(arguments: msgspec.Struct) -> Any:
    return msgspec.json.decode(msgspec.json.encode(arguments))


def test_startpod() -> None:
    assert msgspec.json.encode(StartPod("name")) == (
        b'{"hostname":"name","containers":[],"shareDir":"rootfs","interfaces":[],"routes":[]}'
    )


def test_newcontainer() -> None:
    assert sent(NewContainer(id="a", image="b", process=PROCESS)) == {
        "id": "a",
        "rootfs": "rootfs",
        "image": "b",
        "process": sent(PROCESS),
        "fsmap": [],
        "restartPolicy": "never",
        "initialize": False,
    }


def test_execcmd() -> None:
    assert sent(ExecCmd("a", PROCESS)) == {"container": "a", "process": sent(PROCESS)}


def test_killcontainer() -> None:
    assert sent(KillContainer("a", 15)) == {"container": "a", "signal": 15}
    assert sent(KillContainer("a", 9, all_processes=True)) == {
        "container": "a",
        "signal": 9,
        "allProcesses": True,
    }


def test_winsize() -> None:
    assert sent(WinSize(3, 24, 80)) == {"seq": 3, "row": 24, "column": 80}


def test_a_process_without_a_terminal() -> None:
    process = ProcessOptions(("ls", "-l"), env=(("A", "1"),), workdir="/tmp")
    assert sent(hyper_process(process, 7, None)) == {
        "terminal": False,
        "stdio": 7,
        "stderr": 8,
        "args": ["ls", "-l"],
        "envs": [PATH, {"env": "A", "value": "1"}],
        "workdir": "/tmp",
    }


def test_a_process_with_a_terminal() -> None:
    process = ProcessOptions(("sh",), terminal=True, user="u", group="g")
    assert sent(hyper_process(process, 7, WindowSize(24, 80))) == {
        "terminal": True,
        "stdio": 7,
        "stderr": 0,
        "args": ["sh"],
        "envs": [PATH, {"env": "TERM", "value": "xterm"}],
        "workdir": "/",
        "user": "u",
        "group": "g",
        "rows": 24,
        "columns": 80,
    }


def test_what_is_given_comes_before_what_is_usual() -> None:
    process = ProcessOptions(("sh",), terminal=True, env=(("TERM", "vt100"), ("PATH", "/p")))
    assert sent(hyper_process(process, 1, None))["envs"] == [
        {"env": "PATH", "value": "/p"},
        {"env": "TERM", "value": "vt100"},
    ]
