"""What the daemon logs, read back from a real journal."""

from __future__ import annotations

import json

import pytest

from cc_proxy.api import Refused
from cc_proxy.log.ratelimit import BURST
from tests.systemd.box import CHECKOUT
from tests.systemd.service import SERVICE, Service

JOURNAL = "systemd-journald.service"


def test_each_line_is_json_with_its_identifier_and_priority(daemon: Service) -> None:
    daemon.wait_for_log('"ready"')
    (entry,) = daemon.logged()
    assert (entry["SYSLOG_IDENTIFIER"], entry["PRIORITY"]) == ("cc-proxy", "6")
    assert entry["_SYSTEMD_UNIT"] == SERVICE
    assert json.loads(entry["MESSAGE"]) == {
        "level": "INFO", "message": "ready", "socket": "/run/cc-oci-runtime/proxy.sock",
    }  # fmt: skip


# What the README has people type.
OF_THE_UNIT = "journalctl -u cc-proxy -o cat | jq -R 'fromjson? // .'"
OF_THE_DAEMON = "journalctl -t cc-proxy -o cat | jq"


@pytest.mark.parametrize("command", [OF_THE_UNIT, OF_THE_DAEMON])
def test_the_readme_names_the_commands_that_read_the_log(command: str) -> None:
    assert f"`{command}`" in (CHECKOUT / "README.md").read_text()


def test_jq_reads_what_the_daemon_logs(daemon: Service) -> None:
    daemon.stop(SERVICE)
    messages = shown(daemon, f"{OF_THE_DAEMON} .message")
    assert messages[-2:] == ["ready", "stopping"]


def test_jq_reads_what_the_unit_logs_and_shows_what_systemd_says_of_it(daemon: Service) -> None:
    daemon.stop(SERVICE)
    lines = shown(daemon, f"{OF_THE_UNIT} | jq '.message? // .'")
    assert [line for line in lines if line in {"ready", "stopping"}][-2:] == ["ready", "stopping"]
    assert lines[-1].startswith("Stopped cc-proxy.service")


def shown(daemon: Service, command: str) -> list[str]:
    """The strings that a command prints, one on a line."""
    daemon.box.run("journalctl", "--sync")
    printed = daemon.box.output("bash", "-o", "pipefail", "-c", command)
    return [json.loads(line) for line in printed.splitlines()]


def test_sigusr1_logs_where_each_thread_is(daemon: Service) -> None:
    daemon.kill("USR1")
    assert daemon.wait_for_log("MainThread")["PRIORITY"] == "6"


@pytest.mark.parametrize("how", [("restart",), ("kill", "--signal=KILL")])
def test_a_journal_that_is_restarted_loses_nothing_that_comes_after(
    daemon: Service, how: tuple[str, ...]
) -> None:
    daemon.box.run("systemctl", *how, JOURNAL)
    daemon.box.run("systemctl", "reload", SERVICE)
    assert daemon.wait_for_log("settings reloaded")


def test_a_client_cannot_fill_the_log(daemon: Service) -> None:
    with daemon.client() as client:
        for _ in range(BURST + 200):
            with pytest.raises(Refused):
                client.hello("vm", "no-such-vm", "no-such-vm")
    daemon.stop(SERVICE)
    events = [json.loads(entry["MESSAGE"]) for entry in daemon.logged()]
    count = sum(event["message"] == "VM not registered" for event in events)
    (suppressed,) = (event for event in events if event["message"] == "log lines suppressed")
    assert BURST <= count < BURST + 100
    assert count + suppressed["count"] == BURST + 200
