"""`agent`: the embedded agent in the foreground."""

import fcntl
import os
import select
import shutil
import signal
import stat
import sys

from cc_proxy.ctl import options

#: Written to the ready fd once both sockets listen.
READY = b"\n"


def agent(asked: options.AgentOptions) -> int:
    """Run the agent until a signal comes or its VM powers off; returns the exit status of `run_agent`."""
    from cc_proxy.agent import run_agent  # noqa: PLC0415 - no other command needs an agent

    fd = asked.ready_fd
    if fd is not None:
        os.set_inheritable(fd, False)

    def announce() -> None:
        if fd is None:
            print(f"cc-proxy agent: listens on {asked.vm.ctl} and {asked.vm.io}", file=sys.stderr, flush=True)
            return
        # SIGTERM is already handled. If the peer went away before the kernel was told, the write fails.
        _end_with_peer(fd)
        os.write(fd, READY)

    try:
        return run_agent(asked.vm.ctl, asked.vm.io, lossless=asked.lossless, on_listening=announce)
    finally:
        if asked.remove and fd is not None and _peer_is_gone(fd):
            shutil.rmtree(asked.remove, ignore_errors=True)


def _peer_is_gone(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _end_with_peer(fd: int) -> None:
    """If `fd` is a socket, have the kernel send SIGTERM when its other end is closed.

    So the agent does not outlive the process that started it, even if that is killed. A thread that waits for
    this would disturb the agent, which forks. Pipes are left out: some kernels send a signal at every read.
    """
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGTERM)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
