"""Attention whose weights are the alpha-entmax of the scores."""

from .op import adasplash, entmax_attention

__all__ = ["adasplash", "entmax_attention"]
