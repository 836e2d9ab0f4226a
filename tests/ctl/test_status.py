"""`status` and `log-level`: what they print, of whatever the daemon says."""

from __future__ import annotations

import msgspec
import pytest

from cc_proxy.api import (
    EndedVm,
    LastError,
    Replaced,
    Status,
    Streams,
    Traffic,
    UserStatus,
    VmStatus,
    WaitingCommand,
    WaitingStream,
)
from cc_proxy.ctl.overview import age, overview, size
from tests.ctl.fake_proxy import FakeProxy
from tests.ctl.running import ctl

MIB = 1 << 20

STREAMS = Streams(
    sessions=3,
    traffic=Traffic(
        bytes_to_clients=12 * MIB,
        bytes_to_vm=2048,
        frames_to_clients=900,
        frames_to_vm=7,
        stray_frames=1,
        pauses=2,
    ),
    paused=True,
    waiting=[
        WaitingStream(
            stream=7,
            pid=31,
            uid=0,
            spooled=64 * MIB,
            pending=4096,
            idle=12.7,
            holds_vm=True,
            reason="the spool is full",
        ),
        WaitingStream(
            stream=9, pid=32, uid=1000, spooled=MIB, pending=0, idle=2.0, holds_vm=False, reason=""
        ),
    ],
    waiting_sessions=5,
    spooled=66 * MIB,
    pending=4096,
    stdin_held=300,
    stdin_stalled=3.0,
    stdin_unacknowledged=1,
)
VM = VmStatus(
    id="we\x1bb",
    uid=1000,
    state="up",
    age=187.0,
    clients=2,
    streams=STREAMS,
    answers=True,
    commands=[WaitingCommand(name="destroypod", age=42.0)],
    waiting_commands=3,
    unanswered=4,
    last_error=LastError(text="ping: no answer\nin 60 s", age=5.0),
)
STUCK = msgspec.structs.replace(VM, id="db", streams=None, answers=False, commands=[], waiting_commands=0)
STUCK = msgspec.structs.replace(STUCK, unanswered=0, last_error=None)
USER = UserStatus(uid=0, connections=1, vms=2, sessions=3, commands=4, spooled=MIB)
STATUS = Status(
    version="1.2",
    pid=77,
    uptime=90_061.0,
    settings_file="/etc/cc-proxy.toml",
    log_level="info",
    connections=1,
    users=[USER, msgspec.structs.replace(USER, uid=1000)],
    spooled=66 * MIB,
    vms=[STUCK, VM],
    vm_count=3,
    ended=[EndedVm(id="old", error=LastError(text="the VM hung up its I/O channel", age=61.0))],
)

OVERVIEW = """\
cc-proxy 1.2, pid 77, up for 1 d 1 h
settings: /etc/cc-proxy.toml; log level: info
3 VMs, 3 sessions, 1 connection; 66 MiB spooled

VM       USER  STATE  AGE        CLIENTS  SESSIONS   TO CLIENTS     TO VM       STRAYS  PAUSES
db       1000  up     3 min 7 s  2        no answer
we\\x1bb  1000  up     3 min 7 s  2        3          12 MiB in 900  2 KiB in 7  1       2
… and 1 more

USER  CONNECTIONS  VMS  SESSIONS  COMMANDS  SPOOLED
0     1            2    3         4         1 MiB
1000  1            2    3         4         1 MiB

What waits:
  db: its I/O pump does not answer: it is busy or stuck
  we\\x1bb: the VM waits for stream 7: its client (pid 31, user 0) has taken nothing for 12 s; \
64 MiB spooled, 4 KiB in memory; the spool is full
  we\\x1bb: stream 9 (the VM does not wait for it): \
its client (pid 32, user 1000) has taken nothing for 2 s; 1 MiB spooled
  we\\x1bb: 3 more streams wait for their clients
  we\\x1bb: the VM has taken no stdin for 3 s: 300 B wait for it
  we\\x1bb: stdin of 1 session waits for the agent to acknowledge
  we\\x1bb: the command destroypod has waited for the agent for 42 s
  we\\x1bb: 2 more commands wait behind them
  we\\x1bb: the agent has left 1 command unanswered

Last errors:
  we\\x1bb: ping: no answer\\nin 60 s (5 s ago)

VMs that failed and are gone:
  old: the VM hung up its I/O channel (1 min 1 s ago)
"""


def test_overview() -> None:
    assert overview(STATUS) == OVERVIEW


def test_overview_after_replacements() -> None:
    replaced = Replaced(restarts=1, crashes=2, last="crash")
    said = overview(msgspec.structs.replace(STATUS, known_for=180_122.0, replaced=replaced)).splitlines()
    assert said[:2] == [
        "cc-proxy 1.2, pid 77, up for 1 d 1 h",
        "VMs have been kept for 2 d 2 h, through 1 restart and 2 crashes; this process began after a crash",
    ]
    gone = msgspec.structs.replace(STATUS, known_for=9.0, replaced=replaced, gaps=2, lost=4480)
    assert overview(gone).splitlines()[1].endswith("after a crash; 2 gaps of 4.375 KiB at most")
    replaced = Replaced(restarts=12, last="restart")
    said = overview(msgspec.structs.replace(STATUS, known_for=180_122.0, replaced=replaced)).splitlines()
    assert (
        said[1] == "VMs have been kept for 2 d 2 h, through 12 restarts; this process began after a restart"
    )


def test_overview_of_a_daemon_at_rest() -> None:
    idle = msgspec.structs.replace(
        STATUS, vms=[], vm_count=0, users=[USER], ended=[], settings_file="", connections=1
    )
    assert overview(idle).splitlines()[1:] == [
        "settings: the defaults, there is no file; log level: info",
        "0 VMs, 0 sessions, 1 connection; 66 MiB spooled",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 * MIB, "64 MiB"),
        (1 << 70, "1.049e+06 PiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3_605, "1 h"),
        (3_660, "1 h 1 min"),
        (86_400 * 40, "40 d"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_others_chose_does_not_speak_to_the_terminal(
    proxy: FakeProxy, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    nasty = "a\x1b[2J\r\n\x7f\x9bé\u202e\U000e0001"
    vm = msgspec.structs.replace(STATUS.vms[0], id=nasty)
    ended = [EndedVm(id=nasty, error=LastError(text=nasty, age=1.0))]
    proxy.results["status"] = msgspec.structs.replace(STATUS, vms=[vm], ended=ended)
    assert ctl(proxy, "status", *options) == 0
    printed = capfd.readouterr().out
    assert printed.count("202e") >= 3
    assert all(line.isprintable() for line in printed.split("\n"))
    if options:
        assert msgspec.json.decode(printed, type=Status).vms[0].id == nasty


def test_status(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.results["status"] = STATUS
    assert ctl(proxy, "status") == 0
    assert capfd.readouterr() == (OVERVIEW, "")


def test_status_for_programs(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.results["status"] = STATUS
    assert ctl(proxy, "status", "--json") == 0
    printed = capfd.readouterr().out
    assert msgspec.json.decode(printed, type=Status) == STATUS
    assert '"holdsVm": true' in printed


def test_daemon_that_knows_no_status(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.refused["status"] = "no payload named 'status'"
    assert ctl(proxy, "status") == 125
    assert capfd.readouterr() == ("", "cc-proxyctl: no payload named 'status'\n")


def test_status_larger_than_any_other_response(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.results["status"] = msgspec.structs.replace(STATUS, vms=[VM] * 2_048, vm_count=2_048)
    assert len(msgspec.json.encode(proxy.results["status"])) > MIB
    assert ctl(proxy, "status") == 0
    assert capfd.readouterr().out.count("destroypod") == 2_048


def test_log_level(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    proxy.results["logLevel"] = {"old": "info", "new": "debug"}
    assert ctl(proxy, "log-level", "debug") == 0
    assert proxy.wait_for("logLevel").arguments == {"level": "debug"}
    assert capfd.readouterr().out == "log level: debug (it was info)\n"


def test_log_level_nobody_knows(proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    assert ctl(proxy, "log-level", "loud") == 2
    assert "invalid choice: 'loud'" in capfd.readouterr().err
    assert proxy.names == []
