"""A port that is a device: here a terminal, which is like one but for hosts that come back."""

from __future__ import annotations

import os
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cc_proxy.agent import Agent, CannotListen
from cc_proxy.agent.agent import Surroundings
from cc_proxy.agent.virtioport import VirtioPort, find_ports
from cc_proxy.api.frames import FRAME_HEADER, encode_frame
from cc_proxy.hyperstart.codes import Code
from cc_proxy.hyperstart.control import encode
from tests.agent.host import ACK, PATIENCE, next_

READY = bytes.fromhex("00000008 00000008")
TOLD = bytes.fromhex("8000000000000000 0000000d 01")


class Terminal:
    """A device, and the host on the other side of it."""

    def __init__(self) -> None:
        # The host may read before there is an agent: a terminal that nobody has open is one that hung up.
        self.host, self._keep = os.openpty()
        tty.setraw(self._keep)
        self.path = os.ttyname(self._keep)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += os.read(self.host, size - len(data))
        return data

    def hang_up(self) -> None:
        os.close(self.host)
        self.host = -1

    def close(self) -> None:
        for fd in {self.host, self._keep} - {-1}:
            os.close(fd)


@contextmanager
def agent_on(ctl: Terminal, io: Terminal) -> Iterator[threading.Thread]:
    """An agent that serves two devices; yields its thread."""
    with Agent(ctl.path, io.path, lossless=True, surroundings=Surroundings(VirtioPort)) as agent:
        thread = threading.Thread(target=agent.serve, name="agent")
        thread.start()
        try:
            yield thread
        finally:
            agent.stop()
            thread.join(PATIENCE)


def test_host_is_served_and_its_absence_costs_nothing() -> None:
    with closing(Terminal()) as ctl, closing(Terminal()) as io, agent_on(ctl, io) as thread:
        assert ctl.read(len(READY)) == READY
        assert io.read(len(TOLD)) == TOLD
        os.write(ctl.host, encode(Code.PING, b"{}"))
        assert ctl.read(len(next_(8, 2) + ACK)) == next_(8, 2) + ACK
        ctl.hang_up()
        os.write(io.host, encode_frame(99))
        assert io.read(FRAME_HEADER.size) == encode_frame(99)
        before = cpu_time(thread)
        threading.Event().wait(0.2)
        assert cpu_time(thread) - before < 0.05


def cpu_time(thread: threading.Thread) -> float:
    assert thread.ident
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def test_device_that_is_not_there(tmp_path: Path) -> None:
    with closing(Terminal()) as io, pytest.raises(CannotListen, match="no/such: No such file or directory"):
        Agent("no/such", io.path, surroundings=Surroundings(VirtioPort))


def make_port(sysfs: Path, device: str, name: str) -> None:
    directory = sysfs / device
    directory.mkdir()
    (directory / "name").write_text(name + "\n")


def test_ports_are_found_by_their_names(tmp_path: Path) -> None:
    for device, name in (("vport0p1", "b"), ("vport0p2", ""), ("vport1p1", "a")):
        make_port(tmp_path, device, name)
    found = find_ports(["a", "b"], 0, tmp_path, Path("/dev"))
    assert found == ["/dev/vport1p1", "/dev/vport0p1"]


def test_ports_are_waited_for(tmp_path: Path) -> None:
    later = threading.Timer(0.05, make_port, [tmp_path, "vport0p1", "a"])
    later.start()
    assert find_ports(["a"], PATIENCE, tmp_path) == ["/dev/vport0p1"]
    later.join()


@pytest.mark.parametrize(("names", "there"), [([], "none at all"), (["x", "a"], "a, x")])
def test_missing_port_is_named_and_those_that_are_there(tmp_path: Path, names: list[str], there: str) -> None:
    for number, name in enumerate(names):
        make_port(tmp_path, f"vport0p{number}", name)
    with pytest.raises(CannotListen) as raised:
        find_ports(["a", "b"], 0, tmp_path)
    missing = "b" if "a" in names else "a"
    assert str(raised.value) == (
        f"no virtio-serial port is called {missing} (there are: {there}): "
        f"give the hypervisor a virtserialport with name={missing}"
    )
