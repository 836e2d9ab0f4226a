"""What tests with a real VM share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import image


@pytest.fixture(scope="session")
def guest() -> Path:
    """A directory with the kernel, the initramfs, and what else `make guest` makes."""
    image.require(image.NEEDED)
    image.make()
    return image.BUILT
