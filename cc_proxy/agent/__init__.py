"""The embedded agent: stands in for a VM, to try and test the proxy without one (docs/protocol.md).

It listens on a control and an I/O socket as a hypervisor would, answers like the agent in a VM, has the same
limits, and runs the containers' processes as processes of this host.

    with Agent("/tmp/vm.ctl", "/tmp/vm.io") as agent:
        agent.serve()

`run_agent` does the same as a whole program. `lossless` makes the agent better than hyperstart, `Quirks` make
it worse. `python3 -m cc_proxy.agent --guest` is the agent as the first process of a real VM.
"""

from cc_proxy.agent.agent import Agent
from cc_proxy.agent.errors import CannotListen, Panic
from cc_proxy.agent.program import run_agent
from cc_proxy.agent.quirks import Quirks

__all__ = ["Agent", "CannotListen", "Panic", "Quirks", "run_agent"]
