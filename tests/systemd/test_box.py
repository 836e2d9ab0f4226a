"""The box itself stands what tests do to it."""

from __future__ import annotations

from tests.systemd.box import Box

#: More than wait in the sockets between the box's systemd and this process.
MANY = 24


def test_its_systemd_may_say_as_much_as_it_likes(box: Box) -> None:
    """It reports each time it starts anew, and three times a second while a job takes longer than usual."""
    for _ in range(MANY):
        box.run("systemctl", "daemon-reexec")
    assert box.output("systemctl", "show", "--value", "--property=Version")
