"""Fixtures of the embedded agent's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cc_proxy.agent import Quirks
from tests.agent.host import Host, connected
from tests.agent.running import AgentProgram, AgentThread

MakeAgent = Callable[..., AgentThread]


@pytest.fixture
def make_agent(tmp_sock_dir: Path) -> Iterator[MakeAgent]:
    """Starts an agent with the quirks that are given, or a lossless one."""
    with ExitStack() as running:

        def make(*, lossless: bool = False, **quirks: object) -> AgentThread:
            agent = AgentThread(tmp_sock_dir, Quirks(**quirks), lossless=lossless)  # type: ignore[arg-type]
            return running.enter_context(agent)

        yield make


@pytest.fixture
def agent(make_agent: MakeAgent) -> AgentThread:
    """An agent without quirks, in a thread."""
    return make_agent()


@pytest.fixture
def host(agent: AgentThread) -> Iterator[Host]:
    """A host with a pod in that agent."""
    with connected(agent.ctl, agent.io) as host:
        yield host


@pytest.fixture
def program(tmp_sock_dir: Path) -> Iterator[AgentProgram]:
    """An agent without quirks, as a program."""
    with AgentProgram(tmp_sock_dir, Quirks()) as program:
        yield program


@pytest.fixture
def program_host(program: AgentProgram) -> Iterator[Host]:
    """A host with a pod in that program."""
    with connected(program.ctl, program.io) as host:
        yield host
