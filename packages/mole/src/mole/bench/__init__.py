"""Benchmarks: `mole bench TOPIC`. Every topic checks results before it times anything."""

from .plots import draw
from .run import TOPICS, run

__all__ = ["TOPICS", "draw", "run"]
