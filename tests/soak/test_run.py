"""A very short run, with everything that a long one has."""

from __future__ import annotations

import pytest

from soak.stage import Stage


@pytest.mark.timeout(120)
@pytest.mark.parametrize("replace", [0.0, 1.0])
def test_short_run_is_whole(replace: float) -> None:
    shown: list[str] = []
    record = Stage(2.0, vms=4, seed=7, replace=replace).run(lambda _, what: shown.append(what))
    assert record.done["VMs"] >= 4
    assert record.done["bytes"]
    assert record.samples
    assert bool(record.replacements) == bool(replace)
    assert all(one.echoes and one.pings for one in record.samples)
    assert shown[-1] == "everything that was sent arrives"
    assert record.after.fds == record.before.fds
    # A thread that has answered a question waits a little for another job before it ends.
    assert record.after.threads <= record.before.threads
    assert (record.after.vms, record.after.sessions, record.after.spooled) == (0, 0, 0)
