"""What the unit lets the daemon do, and what it does not, tried from inside."""

from __future__ import annotations

import json
import sys

import pytest

from tests.systemd.service import SERVICE, Service

# Each line is tried on its own; what comes out is its value, or the error's name.
PROBE = """
import ctypes, errno, json, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def call(function, *args):
    result = function(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result

def capset(effective, permitted):
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    call(libc.capset, header, (ctypes.c_uint32 * 6)(effective, permitted, 0, 0, 0, 0))

def unnamed(directory):
    os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600))

def tried(code):
    try:
        eval(code)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

print(json.dumps({code: tried(code) for code in json.loads(sys.argv[1])}))
"""

ALLOWED = (
    "unnamed('/var/tmp')",
    "unnamed('/run/cc-oci-runtime')",
    "socket.socket(socket.AF_UNIX).close()",
    "open('/etc/shadow').close()",  # by CAP_DAC_OVERRIDE, which opens root's VMs
    "os.setgroups([1, 2])",
    "call(libc.setresgid, -1, 1, -1)",
    "call(libc.setresuid, -1, 1, -1)",
    "capset(0xc0, 0xc2)",  # without CAP_DAC_OVERRIDE for a while
)
FORBIDDEN = {
    "open('/etc/cc-proxy/cc-proxy.toml', 'a')": "EROFS",
    "unnamed('/tmp')": "EROFS",
    "unnamed('/home')": "EROFS",
    "unnamed('/var/lib')": "EROFS",
    "socket.socket(socket.AF_INET)": "EAFNOSUPPORT",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)": "EAFNOSUPPORT",
    "os.chown('/var/tmp', 0, 0)": "EPERM",
    "os.setuid(0)": "EPERM",
    "os.chroot('/')": "EPERM",
    "os.nice(1)": "EPERM",
    "call(libc.mount, b'none', b'/tmp', b'tmpfs', 0, None)": "EPERM",
    "call(libc.unshare, 0x10000000)": "EPERM",
    "call(libc.ptrace, 16, 1, 0, 0)": "EPERM",
    "os.mknod('/var/tmp/device', 0o20600, os.makedev(1, 3))": "EPERM",
    "os.chmod('/var/tmp', 0o6777)": "EPERM",
    "open('/proc/sys/kernel/pid_max')": "ENOENT",
    "open('/proc/1/status')": "ENOENT",
    "open('/dev/kmsg')": "ENOENT",
}


@pytest.fixture
def tried(service: Service) -> dict[str, str]:
    """What comes of each attempt in the daemon's place."""
    service.box.write("/usr/local/lib/probe.py", PROBE)
    codes = json.dumps([*FORBIDDEN, *ALLOWED]).replace('"', r"\"")
    command = f'{sys.executable} /usr/local/lib/probe.py "{codes}"'
    oneshot = "Type=oneshot\nWatchdogSec=0\nRestart=no\nRestartForceExitStatus=\nSyslogIdentifier=probe"
    service.drop_in(
        f"[Service]\n{oneshot}\nStandardOutput=truncate:/run/probe\nExecStart=\nExecStart={command}\nExecStop=\n"
    )
    service.start(SERVICE)
    outcome: dict[str, str] = json.loads(service.box.path("/run/probe").read_text())
    return outcome


def test_the_daemon_may_do_what_it_has_to_and_nothing_else(tried: dict[str, str]) -> None:
    assert tried == dict.fromkeys(ALLOWED, "done") | FORBIDDEN


def test_the_daemon_runs_as_a_user_with_three_capabilities(daemon: Service) -> None:
    status = daemon.box.output("cat", f"/proc/{daemon.pid}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    uid = daemon.box.output("id", "-u", "cc-proxy")
    assert fields["Uid"].split() == [uid] * 4
    assert {fields[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"00000000000000c2"}
    assert fields["NoNewPrivs"] == "1"
