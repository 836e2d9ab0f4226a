"""What these tests share with those of the daemon's modules."""

from tests.proxy.conftest import house, logged, rig, space

__all__ = ["house", "logged", "rig", "space"]
