"""How a generator is told what to do: an order a line on stdin, an answer a line on stdout, both JSON."""

import gc
import json
import sys

from bench.flow import StalledError
from bench.streams import WrongBytesError
from cc_proxy.api import ProxyError
from cc_proxy.linux.fds import raise_fd_limit


def serve(generator: object) -> None:
    """Carry out orders, each a method of `generator` by name, until there are no more."""
    raise_fd_limit()
    gc.disable()  # a pause of the generator's would count as the proxy's
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": getattr(generator, order["do"])(**order["with"])}
        except (OSError, ProxyError, StalledError, WrongBytesError) as error:
            answer = {"error": f"{order['do']}: {str(error) or type(error).__name__}"}
        print(json.dumps(answer), flush=True)
