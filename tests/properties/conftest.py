"""How much is tried: HYPOTHESIS_PROFILE=long tries more, and something else each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

#: How long one example takes says more about the machine than about the code.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=160,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile("long", deadline=None, max_examples=10_000, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
