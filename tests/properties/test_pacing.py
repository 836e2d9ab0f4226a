"""Stdin's window: whatever is late, lost or made up, an agent is never sent more than it can keep."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cc_proxy.hyperstart.pacing import FIRST_MARKER, StdinWindow, marked_stream


class Window(RuleBasedStateMachine):
    """An agent that takes what it is sent when it likes; markers may get lost on their way back."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: deque[int | bytes] = deque()  # on its way to the agent: so much payload, or a marker
        self.echoes: deque[int] = deque()  # seqs on their way back
        self.held = 0  # payload sent and not handled, since pacing began
        self.before = 0  # how much of what is on its way was sent before that

    @initialize(io_base=st.integers(1, 2**48 - 1), size=st.integers(1, 2000))
    def begin(self, io_base: int, size: int) -> None:
        self.io_base, self.size = io_base, size
        self.window = StdinWindow(io_base, size)

    @precondition(lambda self: self.window.room)
    @rule(share=st.integers(0, 1000) | st.sampled_from([500, 1000]), typing=st.booleans())
    def send(self, share: int, typing: bool) -> None:
        payload = min(1, self.window.room) if typing else share * self.window.room // 1000
        self.held += payload
        self.sent.append(payload)
        if marker := self.window.sent(payload):
            self.sent.append(marker)
        assert (marker is None) == (not self.window.asked)
        assert marker or self.window.room > 0, "nothing may be sent and nobody was asked why"

    @precondition(lambda self: self.window.asked)
    @rule()
    def ask_again(self) -> None:
        before = self.window.asked
        self.sent.append(self.window.ask_again())
        assert self.window.asked == before + 1

    @precondition(lambda self: self.sent)
    @rule(count=st.integers(1, 3), comes_back=st.booleans() | st.just(True))
    def handle_some(self, count: int, comes_back: bool) -> None:
        for _ in range(min(count, len(self.sent))):
            self.handle(comes_back)

    def handle(self, comes_back: bool) -> None:
        taken = self.sent.popleft()
        if isinstance(taken, bytes):
            seq, length = int.from_bytes(taken[:8], "big"), int.from_bytes(taken[8:], "big")
            assert length == len(taken) == 12
            assert seq >= FIRST_MARKER
            assert marked_stream(seq) == self.io_base
            if comes_back:
                self.echoes.append(seq)
        elif self.before:
            self.before -= 1
        else:
            self.held -= taken

    @precondition(lambda self: self.echoes)
    @rule()
    def echo(self) -> None:
        self.take(self.echoes.popleft())

    @precondition(lambda self: self.window.asked and self.sent)
    @rule()
    def begin_anew(self) -> None:
        self.window.reset()
        self.held = 0
        self.before = sum(not isinstance(what, bytes) for what in self.sent)
        assert self.window.room == self.size

    def take(self, seq: int) -> None:
        if self.window.echoed(seq):
            assert not self.window.asked
            assert self.window.room == self.size
            assert not self.window.echoed(seq), "a marker counts once"

    @invariant()
    def agent_is_never_sent_more_than_it_can_keep(self) -> None:
        if hasattr(self, "window"):
            assert 0 <= self.held <= self.size
            assert self.held + self.window.room <= self.size

    def teardown(self) -> None:
        """An agent that answers in the end makes room in the end."""
        if not hasattr(self, "window"):
            return
        while self.sent:
            self.handle(comes_back=True)
        while self.echoes:
            self.echo()
        if self.window.asked:  # the echo was lost, so it is asked again
            self.sent.append(self.window.ask_again())
            self.handle(comes_back=True)
            self.echo()
        assert self.window.room > 0


TestWindow = Window.TestCase
TestWindow.settings = settings(max_examples=settings().max_examples // 2)


@given(st.integers(1, 2**48 - 1), st.integers(0, 2**64 - 1) | st.integers(0, 7), st.integers(0, 3))
def test_seq_that_was_never_on_its_way_makes_no_room(io_base: int, seq: int, asked_again: int) -> None:
    """Small numbers say which byte of the right seq is another."""
    window = StdinWindow(io_base, 512)
    marker = window.sent(512)
    for _ in range(asked_again):
        marker = window.ask_again()
    right = int.from_bytes((marker or b"")[:8], "big")
    made_up = seq if seq > 7 else right ^ (1 << 8 * seq)
    if made_up != right:
        assert not window.echoed(made_up)
        assert not window.room
    assert window.echoed(right)
    assert window.room == 512
