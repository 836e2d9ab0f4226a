"""What has passed between one VM and its clients."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Written by the pump thread of the VM, read by any."""

    bytes_to_clients: int = 0
    bytes_to_vm: int = 0
    frames_to_clients: int = 0
    #: As the agent gets them: a long frame of a client's is several.
    frames_to_vm: int = 0
    #: Frames from the VM that nobody owned.
    stray_frames: int = 0
    #: How often the VM had to wait because of a client that does not read.
    pauses: int = 0
