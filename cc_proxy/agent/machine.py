"""The machine that a pod runs on. Here it is this host, which stays unchanged."""

from collections.abc import Sequence


class ThisMachine:
    """The host of an agent that stands in for a VM: a pod gets its files, hostname and users.

    A real VM is a `Guest`.
    """

    def start_pod(self, hostname: str, share: str) -> None:
        """Prepare for a pod; `share` names the directory that the hypervisor shares with it, "" for none."""

    def end_pod(self) -> None:
        """Clean up after a pod, none of whose containers is left."""

    def make_root(self, image: str, rootfs: str, volumes: Sequence[object]) -> str | None:
        """Return a container's root directory; None if that is the agent's.

        `volumes` are the host directories that it wants mounted. Raises `CommandRefused`.
        """

    def remove_root(self, root: str | None) -> None:
        """Clean up a root directory that `make_root` returned. Its container has gone."""
