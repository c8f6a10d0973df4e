"""Rows of a table in pinned host memory or on the device, picked by id without a copy engine."""

from .op import gather
from .reference import gather_reference

__all__ = ["gather", "gather_reference"]
