"""The way to the proxy."""

from cc_proxy.api import Client
from cc_proxy.ctl.errors import Failure, reason
from cc_proxy.ctl.options import Proxy


def connect(proxy: Proxy) -> Client:
    """Return a connected client. Raises `Failure` if there is no proxy to connect to."""
    try:
        return Client(proxy.socket_path, timeout=proxy.timeout)
    except OSError as error:
        raise Failure(f"cannot reach cc-proxy at {proxy.socket_path}: {reason(error)}") from None
