"""Attention whose weights are the 1.5-entmax of the scores."""

from .op import adasplash

__all__ = ["adasplash"]
