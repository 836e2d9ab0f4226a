"""What a pod finds around it: this host, of which nothing is changed."""

from collections.abc import Sequence


class ThisMachine:
    """The host of an agent that stands in for a VM: a pod gets its files, its name, its users.

    `Guest` is the one that is a VM indeed.
    """

    def start_pod(self, hostname: str, share: str) -> None:
        """Prepare for a pod; `share` names the directory that the hypervisor shares with it, if it does."""

    def end_pod(self) -> None:
        """There is no pod any more, and nothing that runs."""

    def make_root(self, image: str, rootfs: str, volumes: Sequence[object]) -> str | None:
        """Return the directory that a container has as its root; None if it has that of the agent.

        `volumes` are directories of the host's that it wants mounted. Raises `CommandRefused`.
        """

    def remove_root(self, root: str | None) -> None:
        """The container whose root this was has gone."""
