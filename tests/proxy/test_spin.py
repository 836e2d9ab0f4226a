"""When it is worth while to look for something before going to sleep for it. By a clock that stands still."""

import pytest

from cc_proxy.proxy import spin as module
from cc_proxy.proxy.spin import Spin
from tests.clock import Clock

#: About a microsecond, and nothing is rounded.
MICRO = 2.0**-20


class Peer(Clock):
    """Somebody who is waited for: what a look takes, when there is something, and how often it was looked."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1024.0
        self.spin = Spin()
        self.looks = 0

    def be_quick(self, waits: int = 8) -> None:
        for _ in range(waits):
            self.wait(0)

    def wait(self, comes_after: float, look_takes: float = MICRO) -> str:
        """Have it waited for; returns how it was found."""
        comes_at = self.now + comes_after
        self.looks = 0

        def look() -> str | None:
            self.looks += 1
            self.now += look_takes
            return "looked" if self.now >= comes_at else None

        def sleep() -> str:
            self.now = max(self.now, comes_at)
            return "slept"

        return self.spin.wait(look, sleep)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Peer:
    peer = Peer()
    peer.rule(monkeypatch, module)
    monkeypatch.setattr(Spin, "_shy_until", 0.0)
    return peer


def test_peer_has_to_be_quick_a_few_times(peer: Peer) -> None:
    for _ in range(8):
        assert peer.wait(0) == "slept"
        assert peer.looks == 0
    assert peer.wait(0) == "looked"


def test_quick_peer_is_looked_for(peer: Peer) -> None:
    peer.be_quick()
    assert peer.wait(20 * MICRO) == "looked"
    assert peer.looks == 20
    assert peer.wait(50 * MICRO) == "looked"


def test_looking_has_an_end(peer: Peer) -> None:
    peer.be_quick()
    assert peer.wait(1.0) == "slept"
    assert peer.looks == 63


@pytest.mark.parametrize(("took", "looks"), [(190 * MICRO, 1), (210 * MICRO, 0)])
def test_slow_peer_is_not_looked_for(peer: Peer, took: float, looks: int) -> None:
    peer.be_quick(7)
    peer.wait(took)
    peer.wait(0)
    assert peer.looks == looks


def test_peer_that_is_quick_again_is_looked_for_again(peer: Peer) -> None:
    peer.be_quick()
    peer.wait(1.0)
    peer.be_quick(7)
    assert peer.wait(10 * MICRO) == "slept"
    assert peer.wait(10 * MICRO) == "looked"


def test_who_meets_somebody_else_leaves_the_interpreter_to_them(peer: Peer) -> None:
    peer.be_quick()
    assert peer.wait(150 * MICRO, look_takes=70 * MICRO) == "slept"
    assert peer.looks == 1
    assert peer.wait(10 * MICRO) == "slept"
    assert peer.looks == 0


def test_all_leave_it_to_them_and_not_for_long(peer: Peer) -> None:
    peer.be_quick()
    spins = [peer.spin, Spin()]
    peer.spin = spins[1]
    peer.be_quick()
    peer.wait(150 * MICRO, look_takes=70 * MICRO)
    for spin in spins:
        peer.spin = spin
        assert peer.wait(10 * MICRO) == "slept"
    peer.now += 0.006
    for spin in spins:
        peer.spin = spin
        assert peer.wait(10 * MICRO) == "looked"


def test_what_a_long_look_finds_counts(peer: Peer) -> None:
    peer.be_quick()
    assert peer.wait(70 * MICRO, look_takes=70 * MICRO) == "looked"
    assert peer.wait(0) == "slept"


def test_what_is_found_may_be_empty(peer: Peer) -> None:
    peer.be_quick()
    assert peer.spin.wait(lambda: b"", lambda: b"slept") == b""


def test_error_of_a_look_is_the_callers(peer: Peer) -> None:
    peer.be_quick()

    def look() -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        peer.spin.wait(look, lambda: None)
