"""Shows the proxy at work: a daemon, VMs, processes in them, and what goes in and comes out.

All is real except the virtual machines: the embedded agent stands in for them and runs their processes. Where
there is QEMU, the last one is real too. Needs no privileges, and leaves nothing behind.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

MIB = 1024 * 1024
CHECKOUT = Path(__file__).parent.parent
GUEST = CHECKOUT / "build" / "guest" / "guest.toml"
CTL = [sys.executable, "-m", "cc_proxy.cli.ctl"]


class DemoError(Exception):
    """A result is not what it should be."""


def main() -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cc-proxy-demo-") as directory:
        sock = Path(directory, "run", "proxy.sock")
        try:
            with daemon(sock):
                one_process(sock)
                two_at_once(sock)
                a_lot_out(sock)
                a_lot_in(sock)
                when_it_fails(sock)
                a_real_vm(sock)
            check("the daemon stopped, its socket is gone", not sock.exists(), True)
        except DemoError as error:
            print(f"\nFAILED: {error}", file=sys.stderr)
            return 1
    print(f"\nAll as it should be, in {time.monotonic() - begun:.1f} s.")
    return 0


@contextmanager
def daemon(sock: Path) -> Iterator[None]:
    """A daemon of our own, on a socket of our own."""
    print(f"$ cc-proxy --socket-path {sock}")
    command = [sys.executable, "-m", "cc_proxy", "--socket-path", str(sock), "--log-level", "warning"]
    process = subprocess.Popen(command)
    try:
        while not sock.exists():
            if process.poll() is not None:
                raise DemoError(f"the daemon ended with status {process.returncode}")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        status = process.wait(timeout=10)
    check("exit status of the daemon on SIGTERM", status, 0)


def start(
    sock: Path, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
) -> "subprocess.Popen[bytes]":
    pipe = subprocess.PIPE
    command = [*CTL, "--socket-path", sock, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | environment)


def show(*arguments: str) -> None:
    print("\n$ cc-proxyctl " + " ".join(repr(a) if " " in a else a for a in arguments))


def check(what: str, found: object, expected: object) -> None:
    print(f"  {what}: {found}")
    if found != expected:
        raise DemoError(f"{what}: expected {expected!r}")


def one_process(sock: Path) -> None:
    arguments = [
        "run",
        "--local",
        "-i",
        "--",
        "sh",
        "-c",
        "read name; echo hello $name; echo oops >&2; exit 7",
    ]
    show(*arguments)
    process = start(sock, *arguments)
    out, err = process.communicate(b"world\n", timeout=20)
    check("stdin was 'world', stdout", out, b"hello world\n")
    check("stderr, apart from it", err, b"oops\n")
    check("exit status", process.returncode, 7)


def two_at_once(sock: Path) -> None:
    arguments = ["run", "--local", "--id", "first", "-i", "--", "cat"]
    show(*arguments)
    first = start(sock, *arguments)
    second_arguments = ["run", "--local", "--", "echo", "from another VM, meanwhile"]
    show(*second_arguments)
    second = start(sock, *second_arguments)
    out, _ = second.communicate(timeout=20)
    check(
        "the second ends while the first still runs",
        (out, first.poll()),
        (b"from another VM, meanwhile\n", None),
    )
    out, _ = first.communicate(b"and the first goes on\n", timeout=20)
    check("the first", (out, first.returncode), (b"and the first goes on\n", 0))


def a_lot_out(sock: Path) -> None:
    arguments = ["run", "--local", "--", "sh", "-c", f"seq 1 1000000 | head -c {MIB}"]
    show(*arguments)
    out, _ = start(sock, *arguments).communicate(timeout=30)
    expected = b"".join(b"%d\n" % n for n in range(1, 200_000))[:MIB]
    check("bytes out of the process", len(out), MIB)
    check("their SHA-256", hashlib.sha256(out).hexdigest(), hashlib.sha256(expected).hexdigest())


def a_lot_in(sock: Path) -> None:
    arguments = ["run", "--local", "-i", "--", "sha256sum"]
    show(*arguments)
    data = hashlib.shake_128(b"cc-proxy").digest(MIB)
    out, _ = start(sock, *arguments).communicate(data, timeout=30)
    check(
        "SHA-256 of 1 MiB of stdin, as the process saw it",
        out[:64].decode(),
        hashlib.sha256(data).hexdigest(),
    )


def when_it_fails(sock: Path) -> None:
    show("exec", "nowhere", "--", "true")
    process = start(sock, "exec", "nowhere", "--", "true")
    _, err = process.communicate(timeout=20)
    print(f"  stderr: {err.decode().strip()}")
    check("exit status", process.returncode, 125)


def a_real_vm(sock: Path) -> None:
    arguments = ["run", "--vm", "-i", "--", "sh", "-c", "uname -sr; sha256sum"]
    show(*arguments)
    if not shutil.which("qemu-system-x86_64"):
        print("  left out, there is no QEMU: apt-get install qemu-system-x86")
        return
    if not GUEST.exists() and (problem := make_guest()):
        print(f"  left out, no guest can be made here (`make guest`): {problem}")
        return
    data = hashlib.shake_128(b"cc-proxy").digest(MIB)
    process = start(sock, *arguments, environment={"CC_PROXY_GUEST": str(GUEST)})
    out, err = process.communicate(data, timeout=120)
    print("".join(f"  {line}\n" for line in err.decode().splitlines()), end="")
    check("exit status", process.returncode, 0)
    kernel, digest = out.decode().splitlines()
    print(f"  its kernel: {kernel}")
    check("SHA-256 of 1 MiB of stdin, as the VM saw it", digest[:64], hashlib.sha256(data).hexdigest())


def make_guest() -> str:
    """Make the guest that the VM boots; returns why not, if it cannot be made."""
    print("  (make guest, the first time)")
    build = [CHECKOUT / "packaging" / "guest" / "build", sys.executable]
    result = subprocess.run(build, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (result.stdout.splitlines() or [""])[-1] if result.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
