"""`status` and `log-level`: commands about the daemon itself."""

import msgspec

from cc_proxy.ctl import options
from cc_proxy.ctl.connection import connect
from cc_proxy.ctl.overview import overview
from cc_proxy.ctl.stdio import show
from cc_proxy.log.printable import printable_json


def status(asked: options.StatusOptions) -> int:
    """Show the state of the daemon and its VMs."""
    with connect(asked.proxy) as client:
        answer = client.status()
    if asked.as_json:
        text = msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()
        show(printable_json(text) + "\n")
    else:
        show(overview(answer))
    return 0


def log_level(asked: options.LogLevelOptions) -> int:
    """Set the daemon's log level."""
    with connect(asked.proxy) as client:
        change = client.set_log_level(asked.level)
    show(f"log level: {change.new} (it was {change.old})\n")
    return 0
