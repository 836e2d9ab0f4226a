"""Both units, whatever is done to them in whichever order: one state, and always a way back."""

from __future__ import annotations

import pytest

from tests.asking import asking
from tests.systemd.service import SERVICE, SOCKET, Service

BOTH = f"{SOCKET} {SERVICE}"
#: What leaves a daemon that answers on the unit's socket, after any of the others.
WHOLE = [
    f"start {SERVICE}",
    f"restart {SOCKET}",
    f"restart {SERVICE}",
    f"restart {BOTH}",
    f"restart {SERVICE} {SOCKET}",
    "restart 'cc-proxy.*'",
    f"reload {SERVICE}",
    f"reload-or-restart {BOTH}",
    "daemon-reload",
    "daemon-reexec",
    f"enable --now {SERVICE}",
    f"stop {SERVICE}; systemctl start {SERVICE}",
    f"stop {SOCKET}; systemctl start {SERVICE}",
    f"stop {BOTH}; systemctl start {BOTH}",
    f"disable --now {SOCKET}; systemctl enable --now {BOTH}",
    f"mask --runtime {SOCKET}; systemctl unmask --runtime {SOCKET}; systemctl restart {SOCKET}",
    f"mask --runtime --now {SOCKET}; systemctl unmask --runtime {SOCKET}; systemctl restart {BOTH}",
    f"mask --runtime {SERVICE}; systemctl daemon-reexec; systemctl unmask --runtime {SERVICE}",
]


def systemctl(service: Service, command: str) -> None:
    service.box.run("sh", "-ec", f"systemctl {command}")


def test_every_order_ends_in_a_daemon_that_has_the_socket(service: Service) -> None:
    for command in WHOLE + WHOLE[::-1]:
        check(service, command)


def test_so_it_does_if_clients_never_stop_asking(service: Service) -> None:
    service.start(SERVICE)
    with asking(service.socket_file):
        for command in WHOLE:
            check(service, command)


def check(service: Service, command: str) -> None:
    service.box.run("systemctl", "reset-failed")  # these are more starts than anybody makes in two minutes
    systemctl(service, command)
    assert service.is_whole(), command


@pytest.mark.parametrize("command", [f"stop {SOCKET}", f"stop {BOTH}", f"disable --now {SOCKET}"])
def test_without_the_socket_there_is_no_daemon_even_if_clients_never_stop_asking(
    daemon: Service, command: str
) -> None:
    with asking(daemon.socket_file):
        systemctl(daemon, command)
        assert [daemon.show("ActiveState", unit) for unit in (SOCKET, SERVICE)] == ["inactive", "inactive"]
    assert not daemon.socket_file.exists()


def test_the_daemon_stays_away_as_long_as_its_socket_is_masked(daemon: Service) -> None:
    systemctl(daemon, f"mask --runtime --now {SOCKET}")
    said = daemon.box.run("systemctl", "start", SERVICE, check=False)
    assert "Unit cc-proxy.socket is masked" in said.stdout
    daemon.wait_for("ActiveState", "inactive")
    systemctl(daemon, f"unmask --runtime {SOCKET}")
    daemon.start(SERVICE)
    assert daemon.is_whole()


def test_the_socket_can_be_restarted_any_number_of_times(daemon: Service) -> None:
    for _ in range(7):  # systemd's own limit is 5 in 10 s
        daemon.box.run("systemctl", "restart", SOCKET)
    assert daemon.is_whole()


def test_a_removed_socket_file_comes_back_with_the_socket(daemon: Service) -> None:
    daemon.socket_file.unlink()
    daemon.box.run("systemctl", "restart", SOCKET)
    assert daemon.is_whole()


@pytest.mark.parametrize("runtime", ["docker.service", "containerd.service", "crio.service"])
def test_the_daemon_is_there_for_as_long_as_a_runtime_needs_it(service: Service, runtime: str) -> None:
    """From before its start, and, when all are stopped together as at the host's shutdown, beyond its end."""
    ask = "cc-proxyctl status"
    units = "/run/systemd/system"
    lines = ["[Service]", "Type=oneshot", "RemainAfterExit=yes", f"ExecStart={ask}"]
    lines += [f"ExecStop=sh -c 'until [ -e /run/go ]; do sleep 0.01; done; {ask} >/run/said'"]
    service.box.write(f"{units}/{runtime}", "\n".join(lines))
    service.box.write(f"{units}/end.target", f"[Unit]\nConflicts={BOTH} {runtime}")
    try:
        service.box.run("systemctl", "daemon-reload")
        systemctl(service, f"start {BOTH} {runtime}")
        assert service.show("ActiveState", runtime) == "active"
        systemctl(service, "start --no-block end.target")
        service.wait_for("ActiveState", "deactivating", runtime)
        assert service.is_whole(), "it waits for the runtime's end"
        service.box.write("/run/go", "")
        for each in (runtime, SERVICE, SOCKET):
            service.wait_for("ActiveState", "inactive", each)
        assert "VMs" in service.box.path("/run/said").read_text(), "which is told what it asks"
    finally:
        service.box.write("/run/go", "")
        for command in (f"systemctl stop {runtime}", f"cd {units}; rm {runtime} end.target /run/go"):
            service.box.run("sh", "-c", command)
        service.box.run("systemctl", "daemon-reload")


def test_the_daemon_waits_for_the_users_and_groups_of_the_network(service: Service) -> None:
    assert "nss-user-lookup.target" in service.show("After").split()
