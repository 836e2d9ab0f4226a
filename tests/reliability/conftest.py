"""What these tests share with those of the daemon's modules."""

from tests.proxy.conftest import logged, rig, space

__all__ = ["logged", "rig", "space"]
