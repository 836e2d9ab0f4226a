"""What clients and their processes do with an I/O fd."""

import random
from dataclasses import dataclass
from typing import Literal

#: The process exits; or its client closes the fd, closes one direction of it, or breaks the protocol.
End = Literal["exit", "close", "half-close", "nonsense"]


@dataclass(frozen=True)
class Habit:
    """One kind of client. Rates are in bytes of payload per second."""

    name: str
    down: int = 0
    up: int = 0
    #: Bytes of payload in a frame.
    payload: int = 1024
    #: Whether the process answers each frame of stdin with one of output.
    answers: bool = False
    #: The client reads for this many seconds, then does not read for as many, and so on. 0: always reads.
    stall: float = 0.0
    reads: bool = True
    end: End = "exit"
    #: Seconds that the client stays, on average.
    stays: float = 12.0


HABITS = (
    Habit("types", up=400, payload=40, answers=True),
    Habit("downloads", down=1_500_000, payload=4_000),
    Habit("reads lines", down=100_000, payload=64),
    Habit("uploads", up=80_000, payload=8_000),
    Habit("does both", down=200_000, up=30_000),
    Habit("stalls", down=200_000, payload=4_000, stall=2.0),
    Habit("never reads", down=250_000, payload=8_000, reads=False, end="close", stays=4.0),
    Habit("closes while it is sent something", down=400_000, up=20_000, end="close"),
    Habit("half-closes", down=50_000, up=20_000, end="half-close", stays=6.0),
    Habit("sends nonsense", down=20_000, up=20_000, end="nonsense", stays=6.0),
)


def lifetime(dice: random.Random, average: float) -> float:
    """Return a random lifetime in seconds: the end is as likely at one moment as at any other."""
    return dice.expovariate(1 / average)
