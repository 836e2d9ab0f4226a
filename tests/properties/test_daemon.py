"""The daemon as a whole, against a model of it: what the model says is what the wire shows."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.properties.model import Client, Session, Vm, close_all, settle
from tests.wire.daemon import Daemon, ManagedDaemon
from tests.wire.support import (
    ACK,
    ERROR,
    HYPERSTART_ERROR,
    MARKER,
    NEXT,
    NOT_ATTACHED,
    OK,
    READY,
    VERSIONED,
    FakeVm,
    command,
    error_of,
    frame,
    refused,
    request,
)

#: Seconds. What is answered at once is answered in that, unless the machine is very slow, which is measured.
COMMAND_TIMEOUT = 0.3
TABLES = f"""
[vm]
ready_timeout = 60
command_timeout = {COMMAND_TIMEOUT}
bye_linger = 60
ready_ping_after = 50
[stdin]
echo_timeout = 60
"""
#: Agents that were up before, and stand still while nobody has them work: the daemon asks again soon.
OLD_AND_SLOW = """
window = 512
echo_timeout = 0.005
"""
#: Most of what clients do not read keeps their VM waiting.
SMALL_SPOOL = """
window = 512
[spool]
directory = "/var/tmp"
session_limit = 20_000
total_limit = 50_000
"""
PAUSED = "the VM is not read until its client reads"
IDS = ["web", "db", "shim"]

numbers = itertools.count(1)

indices = st.integers(0, 11)
sizes = st.sampled_from([0, 1, 1, 11, 12, 500, 512, 513]) | st.integers(0, 10_228)
#: How much of what is queued goes out at once: often a part, which may end anywhere.
parts = st.sampled_from([1, 7, 12, 13, 600, 5_000]) | st.just(1 << 40)
requests = st.sampled_from(["attach", "bye", "allocate 1", "allocate 2", "allocate 0", "nonsense"])


class World(RuleBasedStateMachine):
    """Clients, VMs and their sessions, at one daemon that lives longer than they do."""

    def __init__(self, daemon: Daemon, directory: Path, tables: str, done: Counter[str]) -> None:
        super().__init__()
        self.daemon = daemon
        self.directory = directory
        self.paced = "window = 512" in tables
        self.small_spool = tables is SMALL_SPOOL
        self.booted = tables is not OLD_AND_SLOW
        self.done = done
        self.clients: list[Client] = []
        self.vms: list[Vm] = []  # dead ones included
        self.registered: dict[str, Vm] = {}
        self.replacements = 1  # they take half a second each
        self.kills = 1 if isinstance(daemon, ManagedDaemon) else 0
        self.patience = 1  # commands may be left unanswered so often: that takes its time

    # What there is --------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Vm]:
        return [vm for vm in self.vms if vm.alive]

    @property
    def sessions(self) -> list[Session]:
        """Closed by the daemon or not: when that is noticed must not change what can be done next."""
        return [session for vm in self.vms for session in vm.sessions if not session.done]

    @property
    def attached(self) -> list[Client]:
        return [client for client in self.clients if client.vm]

    def payload(self, size: int) -> bytes:
        """Like no other of its size, so that nothing can be taken for something else."""
        number = next(numbers)
        return (b"%d," % number * (size // 2 + 1))[:size]

    @initialize(
        how=st.sampled_from(["at once", "in pieces"]),
        streams=st.lists(st.integers(1, 2), max_size=4),
        early=st.sampled_from([0, 0, 1]),
    )
    def begin(self, how: str, streams: list[int], early: int) -> None:
        """Two VMs with a few sessions, since an empty daemon has little to get wrong."""
        self.connect()
        self.connect()
        for number, container in enumerate(IDS[:2]):
            self.hello(number, container, how)
        for number, count in enumerate(streams):
            self.ask(number, [(f"allocate {count}", "")], cut=0)
        for session in self.unstarted[early:]:
            session.vm.start(session)

    # Clients --------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < 6)
    @rule()
    def connect(self) -> None:
        self.done["connect"] += 1
        self.clients.append(Client(self.daemon.connect()))

    @precondition(lambda self: self.clients)
    @rule(number=indices, how=st.sampled_from(["close", "in a message", "no message"]))
    def disconnect(self, number: int, how: str) -> None:
        """Its sessions and its VM stay."""
        self.done["disconnect"] += 1
        client = self.clients.pop(number % len(self.clients))
        if how == "in a message":
            client.raw.send(request("allocateIO", {"nStreams": 1})[:-3])
        elif how == "no message":
            client.raw.send(b"GET / HTTP/1.1\r\n\r\n")
            assert client.raw.is_closed_unanswered()
        client.raw.close()

    @precondition(lambda self: self.clients and len(self.alive) < 4)
    @rule(
        number=indices,
        container=st.sampled_from(IDS),
        how=st.sampled_from(["at once", "at once", "in pieces", "dies", "is not there"]),
    )
    def hello(self, number: int, container: str, how: str) -> None:
        self.done["hello"] += 1
        client = self.clients[number % len(self.clients)]
        fake = FakeVm(self.directory, f"vm{next(numbers)}")
        if self._is_taken(container) or how == "is not there":
            if how == "is not there":
                fake.io_path = Path("/dev/null/io")  # nor ever will be: it is not waited for
            client.raw.hello(container, fake)
            said = error_of(client.raw.receive())
            if self._is_taken(container):
                assert said == f"{container}: container already registered"
                assert fake.was_not_dialled()
            fake.close()
            return
        client.raw.hello(container, fake)
        fake.accept()
        if how == "dies":
            fake.hang_up()
            error_of(client.raw.receive())
            fake.close()
            return
        if self.booted:
            said_by_vm = command(NEXT, bytes(4)) + command(READY) + command(NEXT)
            cut = {"in pieces": 15}.get(how, 0)
            fake.ctl.sendall(said_by_vm[:cut])
            fake.ctl.sendall(said_by_vm[cut:])
        else:
            fake.answer_questions()
        assert client.raw.receive() == VERSIONED
        witness = self.daemon.connect()
        assert witness.attach(container) == VERSIONED
        client.vm = Vm(
            container, fake, witness, paced=self.paced, may_pause=self.small_spool, booted=self.booted
        )
        client.vm.echoes = self.booted or how == "at once"
        self.vms.append(client.vm)
        self.registered[container] = client.vm

    @precondition(lambda self: self.clients)
    @rule(
        number=indices,
        wanted=st.lists(st.tuples(requests, st.sampled_from(IDS)), min_size=1, max_size=4),
        cut=st.integers(0, 60),
    )
    def ask(self, number: int, wanted: list[tuple[str, str]], cut: int) -> None:
        """Several requests at once, or in pieces; their answers come in order."""
        self.done["request"] += len(wanted)
        client = self.clients[number % len(self.clients)]
        sent = b"".join(self._request(name, container) for name, container in wanted)
        client.raw.send(sent[:cut])
        client.raw.send(sent[cut:])
        for name, container in wanted:
            self._check_answer(client, name, container)

    def _is_taken(self, container: str) -> bool:
        """By a VM that is there: one that has gone is taken over."""
        return container in self.registered and self.registered[container].alive

    def _request(self, name: str, container: str) -> bytes:
        if name.startswith("allocate"):
            return request("allocateIO", {"nStreams": int(name[-1])})
        return request(name, {"containerId": container})

    def _check_answer(self, client: Client, name: str, container: str) -> None:
        vm = self.registered.get(container)
        if name.startswith("allocate"):
            self._check_allocated(client, int(name[-1]))
        elif name == "nonsense":
            assert client.raw.receive() == refused("no payload named 'nonsense'")
        elif vm is None:
            assert client.raw.receive() == refused(f"unknown containerID: {container}")
        elif name == "attach":
            assert client.raw.receive() == VERSIONED
            client.vm = vm
        else:
            assert client.raw.receive() == OK
            client.vm = None
            del self.registered[container]

    def _check_allocated(self, client: Client, streams: int) -> None:
        if not streams:
            assert client.raw.receive() == refused("asking for unexpected number of streams (0)")
        elif client.vm is None:
            assert client.raw.receive() == NOT_ATTACHED
        elif not client.vm.alive:
            assert error_of(client.raw.receive()).startswith("VM gone: ")
        else:
            stream = client.raw.receive_io()
            if not client.vm.next_seq:
                now = int(time.time())  # noqa: TID251 - what the daemon counts from
                assert (now - 60) << 20 < stream.base < (now + 60) << 20, "nobody can have had it"
                client.vm.next_seq = stream.base
            assert stream.base == client.vm.next_seq
            client.vm.next_seq += streams
            client.vm.sessions.append(Session(client.vm, stream, streams))

    # Commands -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.attached)
    @rule(
        which=st.lists(indices, min_size=1, max_size=3),
        answers=st.lists(st.sampled_from([ACK, ACK, ERROR]), min_size=3, max_size=3),
        cut=st.integers(0, 30),
    )
    def commands(self, which: list[int], answers: list[int], cut: int) -> None:
        """Several clients at once; what each is told is what became of its own."""
        clients = {
            number % len(self.attached): self.attached[number % len(self.attached)] for number in which
        }
        self.done["command"] += len(clients)
        begun = time.monotonic()
        asked: dict[tuple[int, bytes], Client] = {}
        for client in clients.values():
            assert client.vm
            payload = b'"%d"' % next(numbers)
            client.raw.hyper("ping", payload.decode())
            if client.vm.alive:
                asked[id(client.vm), payload] = client
            else:
                assert error_of(client.raw.receive()).startswith("VM gone: ")
        vms = {id(client.vm): client.vm for client in asked.values() if client.vm}
        outcome = {}
        for (number, _), answer in zip(asked, answers, strict=False):
            vm = vms[number]
            taken = vm.read_command()
            outcome[number, taken.payload] = answer
            said = b"".join([*map(command, vm.late), command(NEXT, bytes(4)), command(answer)])
            vm.late = []
            vm.fake.ctl.sendall(said[:cut])
            vm.fake.ctl.sendall(said[cut:])
        assert outcome.keys() == asked.keys()
        for key, client in asked.items():
            response = client.raw.receive()
            if response != {ACK: OK, ERROR: HYPERSTART_ERROR}[outcome[key]]:
                assert error_of(response).startswith("no answer ")
                assert time.monotonic() - begun >= COMMAND_TIMEOUT

    @precondition(lambda self: self.patience and any(client.vm.alive for client in self.attached))
    @rule(answer=st.sampled_from([ACK, ERROR]))
    def command_without_answer(self, answer: int) -> None:
        """Or with one that is too late for it, and nobody else's."""
        self.done["command without answer"] += 1
        self.patience -= 1
        client = next(client for client in self.attached if client.vm and client.vm.alive)
        assert client.vm
        client.raw.hyper("getpod")
        client.vm.read_command()
        assert error_of(client.raw.receive()).startswith("no answer from the VM in ")
        client.vm.late.append(answer)

    # VMs ------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(vm.alive for vm in self.vms))
    @rule(
        number=indices,
        frames=st.lists(st.tuples(indices, sizes), min_size=1, max_size=6),
        times=st.sampled_from([1, 1, 1, 40, 150]),
        part=parts,
    )
    def output(self, number: int, frames: list[tuple[int, int]], times: int, part: int) -> None:
        """Frames for its sessions, and for nobody; rows of them; and a part of them for now."""
        vm = self.alive[number % len(self.alive)]
        seqs = [seq for session in vm.sessions for seq in session.seqs]
        seqs += [0, 1_000_000, MARKER + (5 << 48) + 1]
        for which, size in frames:
            payload = self.payload(size)
            for _ in range(times if size < 600 else min(times, 40)):
                self.done["frame of output"] += 1
                vm.queue(seqs[which % len(seqs)], payload)
        vm.flush(part)

    @precondition(lambda self: self.small_spool and any(session.vm.alive for session in self.sessions))
    @rule(number=indices)
    def flood(self, number: int) -> None:
        """More than the spool takes for a client that does not read."""
        self.done["flood"] += 1
        sessions = [session for session in self.sessions if session.vm.alive]
        session = sessions[number % len(sessions)]
        payload = self.payload(10_228)
        for _ in range(80):
            session.vm.queue(session.seqs.start, payload)
        session.vm.flood()

    @precondition(lambda self: any(vm.alive for vm in self.vms))
    @rule(number=indices, echoes=st.integers(0, 3), part=parts)
    def agent_works(self, number: int, echoes: int, part: int) -> None:
        """Takes stdin in, sends some markers back, and some of what is left of its output."""
        self.done["agent works"] += 1
        vm = self.alive[number % len(self.alive)]
        assert vm.handle(), "the daemon hung up"
        vm.answer_pings()
        vm.echo(echoes)
        vm.flush(part)

    @precondition(lambda self: any(vm.alive for vm in self.vms))
    @rule(number=indices, how=st.sampled_from(["ctl", "io", "both", "bad frame", "bad message"]))
    def vm_dies(self, number: int, how: str) -> None:
        self.done["VM dies"] += 1
        vm = self.alive[number % len(self.alive)]
        vm.die(how)

    # Sessions -------------------------------------------------------------------------------------------

    @property
    def unstarted(self) -> list[Session]:
        """Closed by their clients or not: what those sent before is still delivered."""
        return [session for vm in self.alive for session in vm.sessions if not session.started]

    @precondition(lambda self: self.unstarted)
    @rule(number=indices)
    def process_starts(self, number: int) -> None:
        self.done["process starts"] += 1
        session = self.unstarted[number % len(self.unstarted)]
        session.vm.start(session)

    @precondition(lambda self: self.sessions)
    @rule(
        number=indices,
        payloads=st.lists(sizes | st.just(70_000), min_size=1, max_size=4),
        times=st.sampled_from([1, 1, 1, 60]),
        part=parts,
    )
    def stdin(self, number: int, payloads: list[int], times: int, part: int) -> None:
        """Frames, empty ones among them, of which a part is sent for now."""
        session = self.sessions[number % len(self.sessions)]
        for size in payloads:
            for _ in range(times if size < 600 else 1):
                self.done["frame of stdin"] += 1
                session.queue += frame(session.seqs.start, self.payload(size))
        session.push(part)

    @precondition(lambda self: self.sessions)
    @rule(number=indices, part=parts)
    def read(self, number: int, part: int) -> None:
        self.done["read"] += 1
        self.sessions[number % len(self.sessions)].read(part)

    @precondition(lambda self: self.sessions)
    @rule(number=indices, how=st.sampled_from(["half", "whole", "wrong seq", "wrong length"]))
    def session_ends(self, number: int, how: str) -> None:
        self.done["session ends"] += 1
        session = self.sessions[number % len(self.sessions)]
        if how == "half":
            session.half_close()
        elif how == "whole":
            session.close()
            session.done = True
        elif not session.over:
            wrong = (
                frame(session.seqs.start + 1) if how == "wrong seq" else frame(session.seqs.start, length=11)
            )
            session.queue += wrong
            session.push(1 << 40)

    # All ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.replacements)
    @rule()
    def replaced(self) -> None:
        """Another process goes on with everything, wherever it stood."""
        self.done["replaced"] += 1
        self.replacements -= 1
        self.daemon.replace()

    @precondition(lambda self: self.kills)
    @rule()
    def killed(self) -> None:
        """At rest: another process goes on from what was kept, and nothing is lost."""
        assert isinstance(self.daemon, ManagedDaemon)
        self.done["killed"] += 1
        self.kills -= 1
        self.settle()
        for raw in [client.raw for client in self.clients] + [vm.witness for vm in self.vms]:
            # Every pump has ended its turn; and a connection that has had a thread is kept.
            assert json.loads(raw.ask("status"))["success"]
            assert raw.ask("nonsense") == refused("no payload named 'nonsense'")
        self.daemon.crash()
        for vm in self.alive:
            vm.answer_who_asks_anew()
        for client in self.clients:
            if client.vm and not client.vm.alive and client.vm not in self.registered.values():
                client.vm = None

    @rule()
    def settle(self) -> None:
        """All that was sent arrives, and dead VMs' clients read the end."""
        self.done["settle"] += 1
        settle(self.alive, [session for vm in self.alive for session in vm.sessions])
        for session in self.sessions:
            if not session.vm.alive:
                session.read_to_end()

    def teardown(self) -> None:
        """Every byte has arrived, every VM is let go, and the daemon is as it was at the beginning."""
        try:
            for session in self.unstarted:
                session.vm.start(session)
            self.settle()
            for vm in self.alive:
                vm.die("ctl")
            self.settle()
            for container in self.registered:
                client = self.daemon.connect()
                assert client.bye(container) == OK
                client.close()
        finally:
            close_all(self.vms, self.clients)
        self.daemon.check()


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "tables",
    ["window = 512", "window = 0", SMALL_SPOOL, OLD_AND_SLOW],
    ids=["paced", "unpaced", "small spool", "old and slow"],
)
def test_daemon_does_what_the_model_says(
    tables: str, tmp_sock_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: Counter[str] = Counter()
    try:
        run_world(tables, tmp_sock_dir, done)
    finally:
        if os.environ.get("HYPOTHESIS_PROFILE"):
            with capsys.disabled():
                print(f"\n{done.total()} operations: {dict(done.most_common())}")


def run_world(tables: str, directory: Path, done: Counter[str]) -> None:
    """One daemon, and as many worlds one after the other as the profile says."""
    profile = settings()
    examples = max(1, profile.max_examples // (6 if tables is SMALL_SPOOL else 3))
    base = TABLES
    if tables is OLD_AND_SLOW:
        base = base.replace("ready_ping_after = 50", "ready_ping_after = 0.001").replace(
            "echo_timeout = 60\n", ""
        )
    # Without a service manager the next process is started by the one before; with one, by that.
    kind = ManagedDaemon if tables == "window = 512" else Daemon.configured
    with kind(directory, base + tables) as daemon:

        class WorldOfThis(World):
            def __init__(self) -> None:
                super().__init__(daemon, directory, tables, done)

        run_state_machine_as_test(
            WorldOfThis, settings=settings(profile, max_examples=examples, stateful_step_count=30)
        )
        assert daemon.stop() == 0
        assert (PAUSED in daemon.log()) == (tables is SMALL_SPOOL)
