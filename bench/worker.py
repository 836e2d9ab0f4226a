"""How a generator gets its orders: one per line on stdin, with one answer per line on stdout, as JSON."""

import gc
import json
import sys

from bench.flow import StalledError
from bench.streams import WrongBytesError
from cc_proxy.api import ProxyError
from cc_proxy.linux.fds import raise_fd_limit


def serve(generator: object) -> None:
    """Carry out orders until stdin ends. Each names one of `generator`'s methods, and has its arguments."""
    raise_fd_limit()
    gc.disable()  # a pause of the generator would be measured as one of the proxy
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": getattr(generator, order["do"])(**order["with"])}
        except (OSError, ProxyError, StalledError, WrongBytesError) as error:
            answer = {"error": f"{order['do']}: {str(error) or type(error).__name__}"}
        print(json.dumps(answer), flush=True)
