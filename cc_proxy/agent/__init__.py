"""The embedded agent: stands in for a VM, to try and to test the proxy without one (docs/protocol.md).

It listens on a control and an I/O socket as a hypervisor would, answers like the agent in a VM, with its
limits, and runs the containers' processes as processes of this host.

    with Agent("/tmp/vm.ctl", "/tmp/vm.io") as agent:
        agent.serve()

`run_agent` is the same as a whole program. `lossless` makes it a better VM than one with hyperstart, `Quirks`
a worse one. `python3 -m cc_proxy.agent --guest` is the agent in a VM, as its first process.
"""

from cc_proxy.agent.agent import Agent
from cc_proxy.agent.errors import CannotListen, Panic
from cc_proxy.agent.program import run_agent
from cc_proxy.agent.quirks import Quirks

__all__ = ["Agent", "CannotListen", "Panic", "Quirks", "run_agent"]
