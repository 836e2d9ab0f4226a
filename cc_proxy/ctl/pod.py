"""The VM that a command has registered, and the pod it has started there: undone whatever happens."""

import signal
from contextlib import suppress
from types import TracebackType
from typing import Self

from cc_proxy.api import Client, Deadline, Hyper, ProxyError, Refused
from cc_proxy.ctl.errors import Failure, Interrupted, explain, is_from_agent, say, says_why
from cc_proxy.ctl.options import ProxyOptions, VmSockets
from cc_proxy.ctl.requests import KillContainer, StartPod
from cc_proxy.ctl.signals import Signals

#: Seconds that destroying, and then unregistering, may take: a VM that hangs must not keep the user waiting.
_GRACE = 5.0


class TemporaryPod:
    """One VM and its pod, under one id. The end of the context destroys the pod and unregisters the VM.

    Destroying and unregistering use connections of their own, because a request that failed or was
    interrupted leaves its connection in an unknown state.
    """

    def __init__(self, proxy: ProxyOptions, container_id: str, signals: Signals) -> None:
        self._signals = signals
        self._socket_path = proxy.socket_path
        self._container_id = container_id
        # Both are True in case of doubt: a request that was interrupted may have been carried out.
        self._registered = False
        self._started = False
        self._answered = False  # whether hello was
        #: Whether a process may be running in the pod.
        self.busy = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._destroy()
        if self._registered:
            self._unregister()

    def adopt(self) -> None:
        """Take over a VM and a pod that already exist, to undo them at the end of the context."""
        self._registered = self._started = self._answered = True

    def keep(self) -> None:
        """Leave the VM and the pod as they are when the context ends."""
        self._registered = self._started = False

    def register(self, client: Client, vm: VmSockets) -> None:
        """Say hello. The first signal does not interrupt this: the answer tells what has to be undone."""
        try:
            with self._signals.may_interrupt(tolerate=1):
                self._registered = True
                client.hello(self._container_id, vm.ctl, vm.io, vm.console)
                self._answered = True
        except Refused:
            self._registered = False
            raise

    def start(self, client: Client) -> None:
        """Start the pod. If the VM already has one, that is somebody else's and is left alone."""
        try:
            with self._signals.may_interrupt():
                self._started = True
                client.hyper("startpod", StartPod(hostname=self._container_id))
        except Refused as refusal:
            self._started = not is_from_agent(refusal)
            if self._started:
                raise
            hint = "" if says_why(refusal) else "the VM may have a pod already: it takes one at a time"
            raise Failure(f"cannot start a pod: {refusal}", hint=hint) from None

    def _destroy(self) -> None:
        """Destroy the pod, if the VM is still there and answers in time."""
        with (
            suppress(ProxyError, OSError, Interrupted),
            self._signals.may_be_cut_short(),
            self._connect() as client,
        ):
            client.attach(self._container_id)
            if self.busy:
                self._kill(client)
            client.request(Hyper("destroypod"))

    def _kill(self, client: Client) -> None:
        """Kill all processes: one that ignores SIGTERM would keep destroypod from ever being answered."""
        with suppress(Refused):
            client.hyper(
                "killcontainer", KillContainer(self._container_id, signal.SIGKILL, all_processes=True)
            )

    def _unregister(self) -> None:
        try:
            client = self._connect()
        except OSError:
            return  # a proxy that is gone has forgotten its VMs
        with client:
            try:
                with self._signals.may_be_cut_short():
                    client.bye(self._container_id)
            except Refused:
                # If hello was answered, somebody else must have unregistered the VM in the meantime.
                if not self._answered:
                    say(
                        f"{self._container_id} may still become registered: "
                        "the answer to its hello was not waited for"
                    )
            except (ProxyError, OSError, Interrupted) as error:
                say(f"{self._container_id} may still be registered: {explain(error)}")

    def _connect(self) -> Client:
        """Return a client with one deadline for all its requests."""
        return Client(self._socket_path, timeout=Deadline(self._signals.grace(_GRACE)))
