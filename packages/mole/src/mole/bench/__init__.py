"""Benchmarks: `mole bench TOPIC`. Every topic checks results before it times anything."""

from .run import TOPICS, run

__all__ = ["TOPICS", "run"]
