"""Rows that the host finds for a step that runs already: the wait for them, and their way in."""

from .op import admit, hold
from .reference import admit_reference

__all__ = ["admit", "admit_reference", "hold"]
