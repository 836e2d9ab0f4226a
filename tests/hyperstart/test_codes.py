"""The table of codes and names."""

from __future__ import annotations

from cc_proxy.hyperstart.codes import COMMANDS, FROM_AGENT, Code, describe

NAMES = {
    0: "version",
    1: "startpod",
    2: "getpod",
    3: "stoppod",
    4: "destroypod",
    5: "restartcontainer",
    6: "execcmd",
    7: "finishcmd",
    8: "ready",
    9: "ack",
    10: "error",
    11: "winsize",
    12: "ping",
    13: "finishpod",
    14: "next",
    15: "writefile",
    16: "readfile",
    17: "newcontainer",
    18: "killcontainer",
    19: "onlinecpumem",
    20: "setupinterface",
    21: "setuproute",
    22: "removecontainer",
    23: "processasyncevent",
    24: "signalprocess",
    25: "deleteinterface",
}
THE_AGENTS = {8, 9, 10, 14, 23}


def test_codes_and_names_are_these() -> None:
    assert {code.value: code.hyper_name for code in Code} == NAMES


def test_what_clients_may_ask_for_is_everything_but_what_is_the_agents_to_send() -> None:
    expected = {name: code for code, name in NAMES.items() if code not in THE_AGENTS}
    assert {name: int(code) for name, code in COMMANDS.items()} == {**expected, "getversion": 0}


def test_what_is_the_agents_to_send() -> None:
    assert {int(code) for code in FROM_AGENT} == THE_AGENTS


def test_names_are_taken_literally() -> None:
    for name in ("", "PING", "Ping", " ping", "ping\0", "12", "exec_cmd", "EXEC_CMD", "exec", "unknown"):
        assert name not in COMMANDS


def test_codes_are_described_by_their_names_and_unknown_ones_by_their_numbers() -> None:
    assert {code: describe(code) for code in NAMES} == NAMES
    assert describe(Code.EXEC_CMD) == "execcmd"
    for code in (26, 99, 255, 2**31, 2**32 - 1):
        assert describe(code) == f"code {code}"
