"""What the daemon logs, read back from a real journal."""

from __future__ import annotations

import json

from tests.systemd.service import SERVICE, Service


def test_each_line_is_json_with_its_identifier_and_priority(daemon: Service) -> None:
    daemon.wait_for_log('"ready"')
    (entry,) = daemon.logged()
    assert (entry["SYSLOG_IDENTIFIER"], entry["PRIORITY"]) == ("cc-proxy", "6")
    assert entry["_SYSTEMD_UNIT"] == SERVICE
    assert json.loads(entry["MESSAGE"]) == {
        "level": "INFO", "message": "ready", "socket": "/run/cc-oci-runtime/proxy.sock",
    }  # fmt: skip


def test_the_log_of_the_identifier_is_a_stream_of_json(daemon: Service) -> None:
    daemon.stop(SERVICE)
    daemon.box.run("journalctl", "--sync")
    lines = daemon.box.output("journalctl", "-t", "cc-proxy", "-o", "cat").splitlines()
    assert [json.loads(line)["message"] for line in lines][-2:] == ["ready", "stopping"]


def test_sigusr1_logs_where_each_thread_is(daemon: Service) -> None:
    daemon.kill("USR1")
    assert daemon.wait_for_log("MainThread")["PRIORITY"] == "6"


def test_a_journal_that_is_restarted_loses_nothing_that_comes_after(daemon: Service) -> None:
    daemon.box.run("systemctl", "restart", "systemd-journald")
    daemon.box.run("systemctl", "reload", SERVICE)
    assert daemon.wait_for_log("settings reloaded")
