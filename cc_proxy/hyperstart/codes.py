"""The codes of the control channel, and their names in clients' requests (docs/protocol.md, 2)."""

from enum import IntEnum


class Code(IntEnum):
    """The kind of a control message. A member's hyperName is its name in lower case, without `_`."""

    VERSION = 0
    START_POD = 1
    GET_POD = 2
    STOP_POD = 3
    DESTROY_POD = 4
    RESTART_CONTAINER = 5
    EXEC_CMD = 6
    FINISH_CMD = 7
    READY = 8
    ACK = 9
    ERROR = 10
    WINSIZE = 11
    PING = 12
    FINISH_POD = 13
    NEXT = 14
    WRITE_FILE = 15
    READ_FILE = 16
    NEW_CONTAINER = 17
    KILL_CONTAINER = 18
    ONLINE_CPU_MEM = 19
    SETUP_INTERFACE = 20
    SETUP_ROUTE = 21
    REMOVE_CONTAINER = 22
    PROCESS_ASYNC_EVENT = 23
    SIGNAL_PROCESS = 24
    DELETE_INTERFACE = 25

    @property
    def hyper_name(self) -> str:
        """The name that clients and people use for this code."""
        return self.name.replace("_", "").lower()


#: Codes that only the agent sends. A client that asks for one by name is refused.
FROM_AGENT = frozenset({Code.READY, Code.ACK, Code.ERROR, Code.NEXT, Code.PROCESS_ASYNC_EVENT})

#: The commands a client may ask for, by hyperName.
COMMANDS = {code.hyper_name: code for code in Code if code not in FROM_AGENT} | {"getversion": Code.VERSION}


def describe(code: int) -> str:
    """Return the name of any code off the wire, such as `code 99` if it has none."""
    try:
        return Code(code).hyper_name
    except ValueError:
        return f"code {code}"
