"""`python3 -m cc_proxy.agent --guest`: the agent as the first process of a virtual machine."""

import sys

from cc_proxy.agent.program import run_guest

if __name__ == "__main__":
    if sys.argv[1:] != ["--guest"]:
        sys.exit("usage: python3 -m cc_proxy.agent --guest (elsewhere: cc-proxyctl agent)")
    sys.exit(run_guest())
