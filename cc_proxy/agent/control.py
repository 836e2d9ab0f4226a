"""The control channel as the agent serves it: READY, NEXT, and one answer for each command, in order."""

from __future__ import annotations

from collections.abc import Callable

from cc_proxy.agent import commands
from cc_proxy.agent.errors import CommandRefused
from cc_proxy.agent.inbound import ControlReceiver, next_message
from cc_proxy.agent.pod import Pod
from cc_proxy.agent.ports import Port
from cc_proxy.agent.quirks import Quirks
from cc_proxy.hyperstart.codes import Code, describe
from cc_proxy.hyperstart.control import ControlMessage, encode

_EVENT = b'{"container":"","process":"","event":"finished","status":0}'


class CommandServer:
    """Reads commands from the port, one after the other, and has the pod carry them out.

    It reads no further until an answer has gone out, and nothing more after DESTROYPOD: `power_off` is called
    when that is answered. `on_refused` is called with the reason before a command is answered with ERROR,
    because ERROR itself cannot carry one.
    """

    def __init__(
        self,
        port: Port,
        pod: Pod,
        quirks: Quirks,
        power_off: Callable[[], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._port = port
        self._pod = pod
        self._quirks = quirks
        self._power_off = power_off
        self._on_refused = on_refused
        self._receiver = ControlReceiver()
        self._up = False
        self._destroying = False
        self._ready_is_due = not quirks.skip_ready
        pod.on_finished = self._pod_finished

    def boot(self) -> None:
        """Be up: send READY, and begin to read commands."""
        self._up = True
        self._say_ready()
        self._port.set_reading(True)

    # What the port calls -----------------------------------------------------------------------------

    def connected(self) -> None:
        """Send READY if this is the first host after the boot. Drop what the last host did not finish."""
        self._receiver = ControlReceiver()
        self._say_ready()

    def disconnected(self) -> None:
        """Forget answers that have not gone out: the next host would take them for answers to its own."""
        self._port.discard()

    def readable(self) -> None:
        """Read at most one command, and carry it out. Raises `Panic` if the agent does not survive it."""
        message: ControlMessage | None = None
        while message is None and (data := self._port.receive(self._receiver.wanted)):
            self._send(next_message(len(data)))
            message = self._receiver.receive_data(data)
        if message is not None:
            self._carry_out(message)
        if self._destroying or self._port.waiting_size:
            self._port.set_reading(False)
            self._port.when_drained(self._go_on)

    # -------------------------------------------------------------------------------------------------

    def _carry_out(self, message: ControlMessage) -> None:
        try:
            command = commands.decode(message.code, message.payload)
            if isinstance(command, commands.DestroyPod):
                self._destroying = True
                self._pod.destroy(self._destroyed)
                return
            answer = encode(Code.ACK, self._pod.carry_out(command))
        except CommandRefused as error:
            self._on_refused(f"{describe(message.code)}: {error}")
            answer = encode(Code.ERROR)
        self._answer(answer)

    def _destroyed(self) -> None:
        self._answer(encode(Code.ACK))
        self._power_off()

    def _answer(self, answer: bytes) -> None:
        if self._quirks.async_events:
            self._send(encode(Code.PROCESS_ASYNC_EVENT, _EVENT))
        self._send(answer)

    def _pod_finished(self) -> None:
        if self._quirks.async_events:
            self._send(encode(Code.FINISH_POD))

    def _say_ready(self) -> None:
        if self._up and self._ready_is_due and self._port.connected:
            self._ready_is_due = False
            self._send(encode(Code.READY))

    def _send(self, message: bytes) -> None:
        # Without a host, nothing is kept for the next one: see `disconnected`.
        if self._port.connected:
            self._port.send(message)

    def _go_on(self) -> None:
        if not self._destroying:
            self._port.set_reading(True)
